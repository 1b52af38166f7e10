"""What a block with vectors is made of, one operation a file: the plain definition, the kernel, the autograd function.

A vector is `[partials, groups, width]`, equal along the partials: a batch's examples are divided into equal groups in
their order, each with a vector of its own. How the gradient is shared among the partials is not said; their sum is the
vector's gradient.
"""
