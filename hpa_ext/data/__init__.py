"""Samples, data files, toy tasks, collation and safety sets."""

from .collate import calibration_batches, collate_prompts, collate_training
from .conversations import Conversation, Picture, Turn
from .encoding import ConversationEncoder
from .llava_json import write_llava_json
from .record_place import RecordError
from .records import ConversationSet, load_conversations
from .safety_set import SafetySet, collect_safety_set
from .samples import Sample

__all__ = [
    "Conversation",
    "ConversationEncoder",
    "ConversationSet",
    "Picture",
    "RecordError",
    "SafetySet",
    "Sample",
    "Turn",
    "calibration_batches",
    "collate_prompts",
    "collate_training",
    "collect_safety_set",
    "load_conversations",
    "write_llava_json",
]
