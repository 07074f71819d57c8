"""The model zoo: architectures that people bring, each in a tiny and in its published size, at random weights.

Nothing is downloaded. The tiny ones are run by the tests; the published ones are built without memory, on the meta
device, for the table in ``docs/models.md``.
"""

from image_models import IMAGES
from text_models import PAIRS, TEXT

ARCHITECTURES = [*TEXT, *PAIRS, *IMAGES]
