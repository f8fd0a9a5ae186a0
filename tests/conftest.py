"""Hypothesis tries the same examples in every run of the test command; `--hypothesis-profile explore` looks for new ones. Files that take long come first."""
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, print_blob=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("fixed")

LONG = "train_spin", "cluster", "distributed", "train_buildings", "train_unet", "train_roofs", "house", "launch", "evaluate", "serve", "graphjournal", "errors"


def pytest_collection_modifyitems(items):
    "With two workers the last file must not be the longest: one would wait for the other."
    place = {f"test_{name}": k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
