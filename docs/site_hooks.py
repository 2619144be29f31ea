"""For the site: a link to a file of the repository outside of docs/ brings that file along."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent


def on_page_markdown(markdown, *, page, config, files):
    def brought(link):
        path = ROOT / link[1]
        if not path.is_file():
            return link[0]  # a warning, hence an error
        name = f"{link[1]}.txt" if path.suffix == ".md" else link[1]  # as it is: not a page of the site
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, abs_src_path=str(path)))
        return f"]({name})"

    return re.sub(r"\]\(\.\./([^)#]+)\)", brought, markdown)
