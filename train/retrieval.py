"""Do two documents belong together? Retrieval of Long-Range Arena, as a Lightning module."""

from seqzoo.train.classification import Classification
from seqzoo.train.lra.models import ZooForRetrieval
from seqzoo.zoo.base import ZooPreTrainedModel


class Retrieval(Classification):
    """Tell whether two documents belong together: one stack reads each, a head compares.

    Takes what `Classification` takes.
    """

    towers = 2

    def build(self) -> ZooPreTrainedModel:
        """See `Training.build`."""
        return ZooForRetrieval(self.config(num_labels=self.hparams["n_classes"]))
