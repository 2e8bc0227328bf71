"""One way to make a page from a template, by Jinja: self-contained HTML, or Markdown."""

import jinja2


def load_templates(package: str, *, is_html: bool = True) -> jinja2.Environment:
    """The templates in a package's folder `templates`.

    What they are given is escaped in HTML, and a name that they are not given is an error.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=is_html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
