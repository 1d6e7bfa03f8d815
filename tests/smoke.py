"""The GPU tests that tell most, by family, as beginnings of their names.

They run first and in this order: whole steps as graphs, where the first GPU found most, then some of each family
of kernels.  Those measured there, on an H100, took 264 s in sum, compilation and all: 22 s on 12 processes,
of the 90 s that all may take.
"""

SMOKE = {
    "graphs": (
        "engine/test_on_a_gpu.py::test_graph",
        "search/test_graph.py::",
        "test_capture.py::",
    ),
    "bank": (
        "kernels/test_gate_bank.py::test_three_steps_of_two_searches[concrete-weight-",
        "kernels/test_gate_bank.py::test_three_steps_of_two_searches[hard-concrete-block-",
        "kernels/test_gate_bank.py::test_sums_are_right_to_a_millionth",
    ),
    "one gated weight": (
        "kernels/test_gate_kernels.py::test_forward_and_backward[exact-concrete-",
    ),
    "fused": (
        "kernels/test_fused_gemm.py::test_gates[",
        "kernels/test_fused_operation.py::test_gradients_through_autograd[odd",
    ),
    "dlogits": ("kernels/test_dlogits.py::test_gates[",),
    "gated blocks": (
        "kernels/test_block_gemm.py::test_linear[Case(x=(70, 150)",
        "kernels/test_block_gemm.py::test_linear[Case(x=(12608",
        "kernels/test_block_gemm.py::test_conv[",
        "kernels/test_block_gated.py::test_the_operation",
    ),
    "stored blocks": (
        "kernels/test_block_products.py::test_linear[Case(x=(70, 150)",
        "kernels/test_block_products.py::test_linear[Case(x=(12608",
        "kernels/test_block_products.py::test_conv[",
        "kernels/test_block_tiles.py::test_every_tile_computes_the_same[Case(x=(577",
        "kernels/test_block_tiles.py::test_every_tile_computes_the_same[Case(x=(12608",
        "kernels/test_block_algebra.py::",
    ),
    "gated layers": ("kernels/test_gated_layers.py::test_strategies_are_right",),
    "moves": ("kernels/test_moves.py::",),
    "plans": (
        "kernels/test_sparse_layers.py::test_formats_of_kernels",
        "test_planned.py::test_formats_of_kernels_train_alike",
    ),
    "training": ("test_training.py::",),
}
