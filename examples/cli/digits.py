"""An ordinary classifier of scikit-learn's digits; it knows nothing of lightning_prehab."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Classifier(L.LightningModule):
    """Three linear layers.

    Args:
        width: Hidden size.
        lr: Learning rate of AdamW.
    """

    def __init__(self, width: int = 128, lr: float = 1e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.head(self.net(images)), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.accuracy(self.head(self.net(images)), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Digits(L.LightningDataModule):
    """1,200 digits to train on, 597 to validate.

    Args:
        batch_size: Images of a step and process.
    """

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size
        digits = load_digits()
        images, labels = torch.tensor(digits.data, dtype=torch.float32) / 8.0 - 1.0, torch.tensor(digits.target)
        self.train = TensorDataset(images[:1200], labels[:1200])
        self.val = TensorDataset(images[1200:], labels[1200:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=597)
