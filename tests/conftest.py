"Hypothesis tries the same examples in every run of the test command; `--hypothesis-profile explore` looks for new ones."
from hypothesis import settings

settings.register_profile("fixed", derandomize=True, print_blob=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("fixed")
