"""What torch's functions do with a tensor: look at its metadata, at its values, or write to it."""

# What is known of a tensor without its values: attributes and methods.
METADATA = frozenset(
    "shape dtype device requires_grad is_leaf layout ndim is_cuda grad_fn is_sparse is_quantized is_meta is_nested "
    "itemsize nbytes is_cpu is_mps is_xpu is_mkldnn output_nr names is_inference name is_ipu is_maia is_mtia is_vulkan "
    "is_xla is_sparse_csr retains_grad volatile grad_dtype _version _base _cdata _backward_hooks "
    "_post_accumulate_grad_hooks".split()
)
METADATA_METHODS = frozenset(
    "size dim numel nelement ndimension stride is_contiguous element_size is_floating_point is_complex is_signed "
    "is_conj is_neg is_inference __len__ storage_offset get_device".split()
)
READS = frozenset(
    "item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __array__ __repr__ __str__ __format__ "
    "__contains__ equal allclose is_nonzero data_ptr untyped_storage storage __reversed__ __hash__".split()
)


def is_in_place(name: str) -> bool:
    """Whether a function of this name writes to its first argument."""
    if name.startswith("__"):
        return name.startswith("__i") and name not in ("__invert__", "__index__", "__int__") or name == "__setitem__"
    return name.endswith("_")
