"""A report as data, and its two forms: one HTML file that needs nothing else, and Markdown.

Whoever has something to report makes a list of sections of blocks (`page.py`), with drawings from `figures.py` and
`curves.py`, and hands the list to `files.write_report`. Nothing here knows about estimators or trainings.

To add a drawing, write a function that returns SVG. It draws inside `svg.settings()`, takes colors from `svg.py`, and
ends with `svg.to_svg`. To add a kind of block, add a dataclass to `page.py`, its HTML to `page.html.jinja`, its look
to `page.css`, and its text to `to_markdown`.
"""
