"""What the random streams of a run are for.

Each role has a stream of its own, see `support.seeds`.
"""

from support.seeds import Role

SPLIT = Role("split")  # which images train and which validate
WEIGHTS = Role("weights")
POPULATION = Role("population")  # the first population, and breeding
TRAINING_IMAGES = Role("training images", offset=1)  # their order and augmentation
VALIDATION_IMAGES = Role("validation images", offset=2)
DROP_PATH = Role("drop path", factor=1_000_000_007)
# The architectures that a search's winner is compared with, and the images on which that is done.
RANDOM_ARCHITECTURES = Role("random architectures")
FINAL_VALIDATION_IMAGES = Role("final validation images")

ROLES = (
    SPLIT,
    WEIGHTS,
    POPULATION,
    TRAINING_IMAGES,
    VALIDATION_IMAGES,
    DROP_PATH,
    RANDOM_ARCHITECTURES,
    FINAL_VALIDATION_IMAGES,
)
