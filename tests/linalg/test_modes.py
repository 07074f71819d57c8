import torch

from lightning_prehab.linalg.modes import in_full_precision, outside_inference_mode


def test_outside_inference_mode():
    make = outside_inference_mode(lambda: torch.zeros(2))
    with torch.inference_mode():
        assert not make().is_inference()
        assert torch.is_inference_mode_enabled()
    with torch.no_grad():
        outside_inference_mode(lambda: None)()
        assert not torch.is_grad_enabled()


def test_in_full_precision():
    x = torch.randn(8, 8)
    multiply = in_full_precision(lambda: x @ x)
    expected = x @ x
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(multiply(), expected)
        assert multiply().dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
