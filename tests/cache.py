"""What tests of `actcache run` share: small settings, the command's words, what a store holds."""

import sys

import numpy as np

from actcache.run import LayoutSettings

SMALL = LayoutSettings(dtype="float32", segment_rows=128, chunk_bytes=2048, unit_bytes=1)


def contexts_of(snapshot):
    """{(segment, ctx): (token ids, doc keys, {hook: rows})} in position order."""
    found = {}
    for segment in snapshot.segments:
        tokens = segment.tokens()
        rows = {h: np.asarray(segment.acts(h).read(), dtype=np.float32) for h in snapshot.hooks}
        for ctx in np.unique(tokens.ctx):
            mine = np.flatnonzero(tokens.ctx == ctx)
            mine = mine[np.argsort(tokens.pos[mine])]
            found[segment.id, int(ctx)] = (
                tokens.token_id[mine],
                tokens.doc[mine],
                {h: x[mine] for h, x in rows.items()},
            )
    return found


def digests(store):
    return {
        (commit.segment, o.key.removeprefix(commit.folder)): o.sha256
        for segment in store.snapshot().segments
        for commit in segment.commits
        for o in commit.objects
    }


def overrides(settings):
    return [
        "run",
        "host=local",
        f"host.model={settings.host.model}",
        "host.batch_tokens=128",
        "data=parquet",
        f"data.files={settings.data.files}",
        "data.id_column=id",
        f"store={settings.store}",
        "hooks=[resid.1,mlp.0]",
        "context=32",
        "layout.dtype=float32",
        "layout.segment_rows=128",
        "layout.chunk_bytes=2048",
        "layout.unit_bytes=1",
        "progress=false",
    ]


def command(settings, *more):
    return [sys.executable, "-m", "actcache", *overrides(settings), *more]
