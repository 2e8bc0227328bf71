"""One way to make a page from a template: self-contained HTML, by Jinja."""

import jinja2


def load_templates(package: str) -> jinja2.Environment:
    """The templates in a package's folder `templates`.

    What they are given is escaped, and a name that they are not given is an error.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader(package),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
