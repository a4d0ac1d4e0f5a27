"""`python -m actcache.demo`: build the embedded default where it is missing, print its figures."""

from __future__ import annotations

import sys

from actcache.demo import ensure_demo
from actcache.demo.corpus import corpus_report
from actcache.demo.train_host import load_report
from actcache.errors import ActcacheError


def main() -> int:
    """Exit status 0, or 1 after a one-line error."""
    try:
        paths = ensure_demo()
    except ActcacheError as e:
        print(e, file=sys.stderr)
        return 1
    corpus, host = corpus_report(paths.corpus), load_report(paths.host)
    print(
        f"corpus  {paths.corpus}\n"
        f"        {corpus.documents:,} documents, {corpus.characters:,} characters "
        f"of Python {corpus.python}\n"
        f"host    {paths.host}\n"
        f"        {host}\n"
        f"        {host.steps} steps, {host.tokens_seen:,} tokens in {host.seconds:.0f} s "
        f"({host.precision}, {host.threads} threads, stopped by {host.stopped_by})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
