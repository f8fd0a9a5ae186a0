__version__ = "0.1.0"

import warnings

# fastai decorates small functions with torch.jit.script; torch 2.15 warns about each at import. Nothing here uses them.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)
# Without ipywidgets tqdm draws plain bars, which is what a page without a server can show; it need not be said each time.
warnings.filterwarnings("ignore", message="IProgress not found")
del warnings
