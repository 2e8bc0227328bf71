"""The documentation site: Sphinx over the Markdown of docs/, README and BUILD. `make docs`.

Docstrings are Markdown, as all text here. Sphinx wants reStructuredText of them, so each becomes a
directive that parses Markdown.
"""

import functools
import os
import re
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.utils import new_document
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path.insert(0, os.fspath(ROOT))

import univg_jax  # noqa: E402

project, release = "univg_jax", univg_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_heading_anchors = 3
highlight_language = "none"
suppress_warnings = ["myst.header"]  # a page that includes a section begins below its heading

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
add_module_names = False
python_maximum_signature_line_length = 88

copybutton_prompt_text = ">>> "

html_theme = "pydata_sphinx_theme"
html_title = "univg_jax"
html_sidebars = {"try": []}  # no pages below it
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
}


class Markdown(SphinxDirective):
    """Its content is Markdown."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The nodes of the content."""
        document = new_document(self.get_source_info()[0], self.state.document.settings)
        MystParser().parse("\n".join(self.content), document)
        return document.children


def wrap_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list):
    """Makes a docstring the content of a `Markdown` directive."""
    text = re.sub(r"^Raises:\n((?: +.*(?:\n|$))+)", _list_errors, "\n".join(lines), flags=re.M)
    text = re.sub(r"^Example:\n((?: +.*(?:\n|$))+)", _fence_example, text, flags=re.M)
    lines[:] = [".. markdown::", "", *(f"   {line}".rstrip() for line in text.split("\n")), ""]


def _list_errors(section: re.Match) -> str:
    """`Raises:` with an indented line an error, as a list."""
    items = re.sub(r"^ {1,2}(\w+): ", r"* `\1`: ", section[1], flags=re.M)
    return f"Raises:\n\n{items}"


def _fence_example(section: re.Match) -> str:
    return f"```pycon\n{textwrap.dedent(section[1]).rstrip()}\n```\n"


# Types by the names that they have in the code.
ALIASES = {
    "jaxlib._jax.Array": "Array",
    "~PIL.Image.Image | ~numpy.ndarray | str | ~os.PathLike": "Picture",
}


def name_types(app: Sphinx, what: str, name: str, obj: object, options: object, *signature: str):
    """The signature and the type of its result, with aliases."""
    return tuple(
        part and functools.reduce(lambda text, pair: text.replace(*pair), ALIASES.items(), part)
        for part in signature
    )


# Where the sections of BUILD.md are that README links to.
PAGES = {"planning": "pods.md#planning", "launch": "pods.md#launching", "caches": "data.md#caches"}


def fit_section(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Makes a section of README or BUILD one of a page: headings a level up, links to pages."""
    text = re.sub(r"^#(##+ )", r"\1", content[0], flags=re.M)
    content[0] = re.sub(r"\[(.*?)\]\(BUILD\.md#(\w+)\)", _link_page, text)


def _link_page(link: re.Match) -> str:
    return f"[{link[1]}](docs/{PAGES[link[2]]})"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("markdown", Markdown)
    app.connect("autodoc-process-docstring", wrap_docstring)
    app.connect("autodoc-process-signature", name_types)
    app.connect("include-read", fit_section)
