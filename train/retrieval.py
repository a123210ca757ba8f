"""Do two documents belong together? Retrieval of Long-Range Arena, as a Lightning module."""

from seqzoo.train.lra.models import ZooForRetrieval
from seqzoo.train.module import Classification
from seqzoo.zoo.base import ZooPreTrainedModel


class Retrieval(Classification):
    """Tell whether two documents belong together: one stack reads each, a head compares.

    Takes what `Classification` takes.
    """

    towers = 2

    def build(self) -> ZooPreTrainedModel:
        """See `Training.build`."""
        return ZooForRetrieval(self.config(num_labels=self.hparams["n_classes"]))
