"""How often a line of a compiled program runs, and what it computes, from its text alone."""

import jax
import jax.numpy as jnp
import pytest

from itjax.parallel import hlo

# A loop as TPUs write it: nobody says how often it runs; the bound comes in from outside through the tuple.
COUNTING = """HloModule counting, num_partitions=4

%step (a: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %three = s32[] constant(3)
  ROOT %next = s32[] add(%a, %three)
}

%body (p: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %p = (s32[], f32[8]{0:T(128)}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0:T(128)} get-tuple-element(%p), index=1
  %bound = s32[] get-tuple-element(%p), index=2
  %j = s32[] fusion(%i), kind=kLoop, calls=%step
  %y = f32[8]{0:T(128)} negate(%x)
  ROOT %out = (s32[], f32[8]{0:T(128)}, s32[]) tuple(%j, %y, %bound)
}

%cond (q: (s32[], f32[8], s32[])) -> pred[] {
  %q = (s32[], f32[8]{0:T(128)}, s32[]) parameter(0)
  %k = s32[] get-tuple-element(%q), index=0
  %limit = s32[] get-tuple-element(%q), index=2
  ROOT %less = pred[] compare(%k, %limit), direction=LT
}

ENTRY %main (x0: f32[8]) -> f32[8] {
  %x0 = f32[8]{0:T(128)} parameter(0)
  %zero = s32[] constant(1)
  %ten = s32[] constant(BOUND)
  %start = (s32[], f32[8]{0:T(128)}, s32[]) tuple(%zero, %x0, %ten)
  %loop = (s32[], f32[8]{0:T(128)}, s32[]) while(%start), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def times(text, opcode, unknown_trips=1):
    walk = hlo.Walk(hlo.parse(text), unknown_trips=unknown_trips)
    return [run.times for run in walk.runs() if run.instruction.opcode == opcode], walk.unknown


@pytest.mark.parametrize(("bound", "trips"), [(10, 3), (11, 4), (1, 0), (302, 101)])  # 1, 4, 7, ... while less
def test_a_loop_of_which_nothing_is_said_is_followed(bound, trips):
    assert times(COUNTING.replace("BOUND", str(bound)), "negate") == ([trips], [])


def test_a_loop_that_its_data_bounds_is_counted_as_told_and_named():
    text = COUNTING.replace("%ten = s32[] constant(BOUND)", "%ten = s32[] parameter(1)")
    assert times(text, "negate", unknown_trips=7) == ([7], ["jit(f)/while"])


def test_what_xla_says_of_a_loop_is_believed():
    text = COUNTING.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}')
    assert times(text, "negate")[0] == [12]


def test_counters_wrap_around_as_their_type_does():
    """Counting down in unsigned numbers is adding the largest: 9, 6, 3, and no more while at least 2."""
    text = COUNTING.replace("s32", "u32").replace("constant(3)", "constant(4294967293)")
    text = text.replace("constant(1)", "constant(9)").replace("constant(BOUND)", "constant(2)")
    assert times(text.replace("direction=LT", "direction=GE"), "negate")[0] == [3]


@pytest.mark.parametrize(
    ("kind", "bytes"),
    [
        ("f32[4,2]{1,0:T(8,128)(2,1)S(1)}", 32),
        ("(bf16[3]{0}, /*index=1*/u32[], pred[5]{0})", 6 + 4 + 5),
        ("s4[10]{0}", 5),
        ("f8e4m3fn[7]{0}", 7),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_type(kind, bytes):
    assert hlo.size(kind) == bytes


def counted(function, *shapes):
    """FLOPs of a function that is compiled here: with the trips of its loops, and as XLA counts them, loops once."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(function).lower(*arrays).compile()
    runs = hlo.Walk(hlo.parse(compiled.as_text()), unknown_trips=1).runs()
    return sum(hlo.flops(run) * run.times for run in runs)


def test_a_product_in_a_scan_counts_once_per_trip():
    def f(x_BD, kernels_LDD):
        return jax.lax.scan(lambda x_BD, kernel_DD: (jnp.tanh(x_BD @ kernel_DD), None), x_BD, kernels_LDD)[0]

    assert counted(f, (32, 64), (5, 64, 64)) == 5 * 2 * 32 * 64 * 64


def test_recomputation_shows_in_the_count():
    """Forward, again for the backward pass, and two products of the backward pass, of which dx of the first layer is spared."""

    def loss(kernels_LDD, x_BD):
        layer = jax.checkpoint(lambda x_BD, kernel_DD: (jnp.sin(x_BD @ kernel_DD), None))
        return jax.lax.scan(layer, x_BD, kernels_LDD)[0].sum()

    assert counted(jax.grad(loss), (5, 64, 64), (32, 64)) == 4 * 5 * 2 * 32 * 64 * 64


@pytest.mark.parametrize(
    ("window", "left", "right", "out", "labels", "flops"),
    [
        ("", "8,16", "16,32", "8,32", "bf_io->bf", 2 * 8 * 16 * 32),  # a plain product
        # the four batches of a batched product as a dimension of space: each meets itself alone
        ("window={size=4 stride=3 pad=0_0 lhs_dilate=4}", "4,8,16", "4,16,32", "4,8,32", "0bf_0io->0bf", 4 * 2 * 8 * 16 * 32),
        ("window={size=3 pad=1_1}", "1,10,1", "3,1,1", "1,10,1", "b0f_0io->b0f", 2 * (3 * 10 - 2)),  # padding is no work
    ],
)  # fmt: skip
def test_products_that_tpus_write_as_convolutions(window, left, right, out, labels, flops):
    text = f"""HloModule products

ENTRY %main (a: f32[{left}], b: f32[{right}]) -> f32[{out}] {{
  %a = f32[{left}]{{0}} parameter(0)
  %b = f32[{right}]{{0}} parameter(1)
  ROOT %c = f32[{out}]{{0}} convolution(%a, %b), {window + ", " if window else ""}dim_labels={labels}
}}
"""
    (run,) = (
        run for run in hlo.Walk(hlo.parse(text), unknown_trips=1).runs() if run.instruction.opcode == "convolution"
    )
    assert hlo.flops(run) == flops


def test_convolutions_of_this_machine_are_counted_as_xla_counts_them():
    def f(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 1), ((1, 1), (0, 2)), lhs_dilation=(1, 2), rhs_dilation=(2, 1)
        )

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3, 11, 7), (5, 3, 3, 2))]
    compiled = jax.jit(f).lower(*arrays).compile()
    (run,) = (
        run
        for run in hlo.Walk(hlo.parse(compiled.as_text()), unknown_trips=1).runs()
        if run.instruction.opcode == "convolution"
    )
    assert hlo.flops(run) == compiled.cost_analysis()["flops"]
