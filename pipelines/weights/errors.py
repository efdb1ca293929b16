"""Everything that can keep weights from being installed. Each message says what to do next."""

from pipelines.base import UnusableWeights


class PullError(Exception):
    """The weights could not be installed, or what is on disk could not be read."""


class NothingToPull(PullError):
    """The model has no weights of its own, or its source holds none that could be loaded."""


class LicenceNotAccepted(PullError):
    """The licence forbids some uses, and nobody has accepted it here."""


class Offline(PullError):
    """The weights are not here, and the network may not be used."""


class NotEnoughSpace(PullError):
    """The disk is too small for what is still to come."""


class Gated(PullError):
    """The repository wants its terms accepted by a person with an account."""


class NotFound(PullError):
    """The source does not exist, or no longer."""


class Unreachable(PullError):
    """The source did not answer, or broke off. Nothing is lost: the next pull goes on from there."""


class HashMismatch(PullError):
    """What arrived is not what was promised."""


class Damaged(PullError, UnusableWeights):
    """A weights file is cut short or is not of the kind that its name says."""


class PickleRefused(PullError, UnusableWeights):
    """A pickle can run any code when it is loaded, so none ever is."""
