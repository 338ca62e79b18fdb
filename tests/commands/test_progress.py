"""What a person sees of an epoch."""

from fastdynat.terminal.training_progress import summary


def test_a_dynat_epoch_on_one_line_of_a_terminal() -> None:
    row = {
        "loss": 2.5129,
        "guide_loss": 1.0289,
        "train_adv_acc": 0.121,
        "guide_acc": 0.838,
        "label_agreement": 0.838,
    }
    row |= {"zero_grad_share": 0.0, "val_clean_acc": 0.403, "val_pgd10_acc": 0.25}
    expected = "loss 2.513  guide loss 1.029  adv acc 12.1  guide acc 83.8  agree 83.8  val clean 40.3  val pgd10 25.0"
    assert "  ".join(summary(row)) == expected


def test_images_without_a_gradient_are_said() -> None:
    assert "zero gradients 4.5" in summary({"loss": 1.0, "zero_grad_share": 0.045})
    assert summary({"loss": 1.0, "train_acc": 0.5, "val_clean_acc": None}) == ["loss 1.000", "acc 50.0"]
