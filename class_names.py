"""Compare the class names of two splits, and detect names that only look the same on a screen."""

import unicodedata

from support.files import UserError

# Each pair holds letters of another alphabet, and the Latin letters that look like them.
CYRILLIC = (
    "\u0430\u0441\u0501\u0435\u04bb\u0456\u0458\u04cf\u043e\u0440\u051b\u0455\u051d\u0445\u0443"
    "\u0410\u0412\u0421\u0415\u041d\u0406\u0408\u041a\u041c\u041e\u0420\u0405\u0422\u0425\u0423",
    "acdehijlopqswxyABCEHIJKMOPSTXY",
)
GREEK = (
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf\u03bd\u03c1\u03b9",
    "ABEZHIKMNOPTYXovpi",
)
LOOKS_LIKE = str.maketrans(CYRILLIC[0] + GREEK[0], CYRILLIC[1] + GREEK[1])


def unicode_form(name: str) -> str:
    """Return a name in the Unicode form NFC, so that names that differ only in Unicode form become equal.

    For example, an accented letter can be one character, or a letter and a separate accent.
    """
    return unicodedata.normalize("NFC", name)


def appearance(name: str) -> str:
    """Return the same text for all names that a reader could not tell apart on a screen."""
    visible = [char for char in unicode_form(name) if unicodedata.category(char) != "Cf"]  # Cf: invisible characters
    dashes = ["-" if unicodedata.category(char) == "Pd" else char for char in visible]  # Pd: all kinds of dashes
    return " ".join("".join(dashes).translate(LOOKS_LIKE).split())


def check_same_classes(name: str, classes: list[str], other_name: str, other_classes: list[str]) -> None:
    """Raise UserError if two splits, called `name` and `other_name`, have different classes.

    The message lists some of the differences. Names that look alike are shown in quotes, as ASCII
    with escapes.
    """
    if classes == other_classes:
        return
    shared = set(classes) & set(other_classes)
    only = [one for one in classes if one not in shared]
    only_other = [other for other in other_classes if other not in shared]
    by_form = {unicode_form(one): one for one in only}
    for other in only_other:
        one = by_form.get(unicode_form(other))
        if one is not None:
            raise UserError(
                f"class {ascii(one)} of {name} and class {ascii(other)} of {other_name} differ only in the Unicode "
                "form of their names: rename the folder of one of the two classes"
            )
    alike = {appearance(one) for one in only} & {appearance(other) for other in only_other}
    found = []
    if only:
        found.append(f"only in {name}: {some_names(only, alike)}")
    if only_other:
        found.append(f"only in {other_name}: {some_names(only_other, alike)}")
    hint = ". Names in quotes look alike but are not the same: rename the folders of one split" if alike else ""
    raise UserError(f"the classes of {name} and {other_name} differ: {'; '.join(found) or 'in their order'}{hint}")


def some_names(names: list[str], alike: set[str]) -> str:
    """Return up to three names as text.

    Names whose appearance is in `alike` come first, in quotes, as ASCII with escapes.
    """
    confusing = [ascii(name) for name in names if appearance(name) in alike]
    plain = [name for name in names if appearance(name) not in alike]
    shown = [*confusing, *plain]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")
