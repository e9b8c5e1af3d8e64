"""From a network and a folder of pictures to a decision: is a conversion worth it, and with which setting."""

from cadsurgery.tasks.recommend.report import Recommendation
from cadsurgery.tasks.recommend.search import recommend

__all__ = ["Recommendation", "recommend"]
