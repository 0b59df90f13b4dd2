"""What can be guaranteed about a pruned model: measured, provable and only estimated bounds on its logits."""

from rmtkern.certificates.certify import certify
from rmtkern.certificates.report import Bound, Certificate, Measured, StepCertificate

__all__ = ["Bound", "Certificate", "Measured", "StepCertificate", "certify"]
