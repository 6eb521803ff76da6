"""Questions to a model: in a terminal, from a program, and many at once.

    model, processor = load_for_answering("user/model")
    print(Conversation(model, processor).ask("What is in the picture?", [open_image("photo.jpg")]))

These three names stand in the cards of models on the Hub and stay where they are.
"""

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.pictures import open_image

__all__ = ["Conversation", "load_for_answering", "open_image"]
