"""Attention sites: their records, and what every command asks about them.

`record` is the site itself. `kind` says what differs between operators, answered in `window` and `block_sparse`;
`graph` and `listed_blocks` read a site's sizes and block lists back from the artifact.
"""
