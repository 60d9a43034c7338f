"""`pretrain data ...`: make, convert, index, verify, describe and label shards."""

from __future__ import annotations

from launch.commands.arguments import command_app, examples
from launch.commands.data_convert import CONVERT_EXAMPLES, convert
from launch.commands.data_inspect import INDEX_EXAMPLES, STATS_EXAMPLES, VERIFY_EXAMPLES, index, stats, verify
from launch.commands.data_make import MAKE_EXAMPLES, make
from launch.commands.label import LABEL_EXAMPLES, SELECT_EXAMPLES, label, select

app = command_app(
    "Makes, converts, checks, describes and labels shards: plain WebDataset tars with an index and a manifest.",
    is_group=True,
)
for _command, _lines in (
    (make, MAKE_EXAMPLES),
    (convert, CONVERT_EXAMPLES),
    (index, INDEX_EXAMPLES),
    (verify, VERIFY_EXAMPLES),
    (stats, STATS_EXAMPLES),
    (label, LABEL_EXAMPLES),
    (select, SELECT_EXAMPLES),
):
    app.command(epilog=examples(*_lines))(_command)
