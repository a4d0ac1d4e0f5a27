"""`python -m saetrain.saes`: name, module and one-line description of every architecture."""

from saetrain.saes import load_all
from saetrain.saes.base import describe

for cls in load_all().values():
    print("{name:<16} {module:<28} {summary}".format(**describe(cls)))
