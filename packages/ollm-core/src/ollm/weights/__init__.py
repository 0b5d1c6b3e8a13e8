"""Weights that are read from a checkpoint's safetensors files while the model runs.

`shards` and `checkpoint` check what is in the files, `layout` says how a decoder layer lies in memory, `ring` reads
layers ahead, `streamer` binds them to the model's modules. Knows torch modules and files, not transformers.
"""
