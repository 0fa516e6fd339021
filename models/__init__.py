"""Language models in plain PyTorch: the transformer, its loss, optimizer, parallelism, generation and exchange format.

Nothing here knows Ray or the files of the other rooms: tensors come in, tensors go out.
"""
