"""Bytes on disk: the helper that every store uses, so that all of them keep the same promises.

From the bottom: `folder` (private folders, locks, cleaning up), `records` and `manifest` (the format), `room` (is there
any left), `segments` (`SegmentedStorage`, what stores use), `tensors` (between tensors and bytes). System calls and
files are in `io`. Nothing here knows of attention, models or strategies. The format is written down in
`docs/reference/on-disk-format.md`.
"""
