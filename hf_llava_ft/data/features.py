"""How rows lie in a dataset, whatever they were read from: `hf_llava_ft.data.schema` with Arrow's types."""

from datasets import Features, Image, List, Value

FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        "num_words": Value("int32"),
        "num_images": Value("int32"),
    }
)
