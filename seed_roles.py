"""The roles of the random numbers in a run.

Each role has its own stream of random numbers, see `support.seeds`.
"""

from support.seeds import Role

SPLIT = Role("split")  # which images train and which validate
WEIGHTS = Role("weights")
POPULATION = Role("population")  # the first population, and breeding
TRAINING_IMAGES = Role("training images", offset=1)  # order and augmentation of the training images
VALIDATION_IMAGES = Role("validation images", offset=2)
DROP_PATH = Role("drop path", factor=1_000_000_007)
# The random architectures that a search's winner is compared with, and the images for this
# comparison.
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
