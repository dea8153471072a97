"""What can be proved: certified removal for linear heads, accounting of noisy descent, explanations that stay valid."""

from expunge.guarantees.certified_removal import BudgetSpent, CertifiedHead, train_certified
from expunge.guarantees.features import frozen_features
from expunge.guarantees.linear import unit_rows
from expunge.guarantees.noisy_descent import NoisyDescent, descent_to_delete_sigma, empirical_epsilon
from expunge.guarantees.promise import Promise
from expunge.guarantees.recourse import Explanations, LinearRecourse, validity
from expunge.guarantees.recourse_network import HeadInfluence

__all__ = [
    "BudgetSpent",
    "CertifiedHead",
    "Explanations",
    "HeadInfluence",
    "LinearRecourse",
    "NoisyDescent",
    "Promise",
    "descent_to_delete_sigma",
    "empirical_epsilon",
    "frozen_features",
    "train_certified",
    "unit_rows",
    "validity",
]
