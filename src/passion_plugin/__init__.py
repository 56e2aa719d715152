"""passion-plugin: train any multi-encoder segmentation model well when modalities are missing.

An add-on for PyTorch that implements PASSION (Shi et al., ACM MM 2024, arXiv:2407.14796). A training loop takes it on
with three lines, marked 1 to 3 below; in ``eval()`` the wrapper is the bare backbone.

>>> import torch
>>> from torch import nn
>>> from passion_plugin import PassionWrapper
>>> _ = torch.manual_seed(0)

Any model with one encoder per modality will do, as long as a mask says which modalities are present:

>>> class Net(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.t1_encoder = nn.Conv2d(1, 4, 3, padding=1)
...         self.t2_encoder = nn.Conv2d(1, 4, 3, padding=1)
...         self.classifier = nn.Conv2d(4, 2, 1)
...     def forward(self, x, mask):
...         features = torch.stack([self.t1_encoder(x[:, :1]), self.t2_encoder(x[:, 1:])], dim=1).relu()
...         weight = mask[:, :, None, None, None].float()
...         return self.classifier((features * weight).sum(1) / weight.sum(1))

T1 is missing for one patient in five, T2 for four in five:

>>> model = Net()
>>> model = PassionWrapper(model, modalities=("t1", "t2"), missing_rates={"t1": 0.2, "t2": 0.8})       # 1
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> x, target = torch.rand(2, 2, 8, 8), torch.randint(2, (2, 8, 8))
>>> mask = torch.tensor([[True, True], [True, False]])
>>> prediction = model(x, mask)
>>> loss = nn.functional.cross_entropy(prediction, target) + model.passion_loss(target)                # 2
>>> loss.backward(); optimizer.step()
>>> report = model.end_epoch()                                                                         # 3
>>> sorted(report.as_dict())
['t1', 't2']
"""

from passion_plugin.backbone import BackboneSpec
from passion_plugin.config import PassionConfig
from passion_plugin.data import IncompleteDataset, PresenceTable, draw_presence
from passion_plugin.detection import detect_spec, inspect_backbone
from passion_plugin.errors import PassionError, PassionWarning
from passion_plugin.training import PreferenceEstimator, attach, get_passion_state_dict, set_passion_state_dict
from passion_plugin.wrapper import PassionWrapper

__version__ = "0.1.0"

__all__ = [
    "BackboneSpec",
    "IncompleteDataset",
    "PassionConfig",
    "PassionError",
    "PassionWarning",
    "PassionWrapper",
    "PreferenceEstimator",
    "PresenceTable",
    "attach",
    "detect_spec",
    "draw_presence",
    "get_passion_state_dict",
    "inspect_backbone",
    "set_passion_state_dict",
]
