"""From text to batches: sources -> cleaning -> dedup -> build -> shards -> stream.

Read in that order: `sources` reads documents out of files, folders and hubs, `cleaning` normalises
them, `dedup` drops repeats and fixes order and split, `build` drives it all and writes `shards`,
`report` tells what was kept and why the rest was not, and `stream` turns a corpus into batches.
"""
