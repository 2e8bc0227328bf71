"""The formats, one module each, which `export.format.open_format` imports.

To add one, write its module here, with a `FORMAT` (`export.format.Format`).
"""

import pkgutil

FORMATS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))
