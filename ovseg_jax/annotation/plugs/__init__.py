"""Annotators, one file a family of models: Hugging Face's classes as they are, and our own towers.

The size of the weights in memory is that of the named checkpoint; activations come on top. Licences are those of the
weights as they were published: read the model card before use.
"""
