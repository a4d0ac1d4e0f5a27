"""`python -m actcache` is the command `actcache`."""

from actcache.cli import main

main()
