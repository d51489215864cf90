"""Numbers of chips: each kind of device finds its own, and what is computed from them is of the right size."""

import pytest

from itjax.base.chips import CHIPS, GiB, chip_of


def test_v5p_and_v5e_are_told_apart_although_one_name_begins_with_the_other():
    assert chip_of("TPU v5").name == chip_of("TPU v5p").name == "v5p"
    assert chip_of("TPU v5 lite").name == "v5e"


def test_every_kind_belongs_to_one_chip():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
    assert all(chip_of(kind).kinds.count(kind) == 1 for kind in kinds)


def test_a_device_whose_numbers_are_not_known_has_none():
    assert chip_of("NVIDIA H100 PCIe") is None  # slower than the H100 of the table, though its name begins like it
    assert chip_of("cpu").flops is None


@pytest.mark.parametrize(
    ("name", "tflops", "mfu"),
    [("v5e", 120, 61), ("v5p", 328, 71.5), ("v6e", 462, 50.3), ("h200", 508, 51.4)],
)
def test_peaks_are_those_by_which_others_publish_their_utilisation(name, tflops, mfu):
    """MaxText's README files beside its configs, and the recipes for A3 Ultra: TFLOP/s per device, % of the peak."""
    assert 100 * tflops * 1e12 / CHIPS[name].flops == pytest.approx(mfu, abs=0.1)


def test_a_gpu_gives_a_program_the_share_that_jax_takes_and_a_tpu_all_it_has():
    assert CHIPS["h200"].limit() == int(CHIPS["h200"].memory * 0.75)
    assert CHIPS["h200"].limit(0.95) > 132 * GiB
    assert CHIPS["v5e"].limit() == CHIPS["v5e"].memory == int(15.75 * GiB)
    assert CHIPS["cpu"].limit() is None


def test_peaks_are_in_the_order_of_the_hierarchy():
    """Products are bounded by memory, memory is faster than links, links than the network."""
    for chip in CHIPS.values():
        if chip.flops:
            assert chip.flops > chip.bandwidth > chip.link > chip.network > 0, chip.name


def test_every_number_has_a_source():
    assert all("https://" in chip.source for chip in CHIPS.values() if chip.platform != "cpu")
