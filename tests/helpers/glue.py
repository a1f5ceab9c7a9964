"""A GLUE download in miniature: four training rows and three held-out rows per task, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast

# Fields after the row's index, tab-separated; `{tree}` stands for a parse, which nobody reads.
_MNLI = "11\t11e\tfiction\t(a)\t(b)\t(c)\t(d)\t"
TRAIN_FILES = {
    "cola": [
        "gj04\t1\t\tthe cat sat",
        "gj04\t0\t*\tcat the sat",
        "gj04\t1\t\tthe dog sat",
        "gj04\t0\t*\tdog sat the",
    ],
    "sst2": ["sentence\tlabel", "a fine film \t1", "a dull film \t0", "fine \t1", "dull and long \t0"],
    "mrpc": [
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t70\t71\the said " no "\the refused',
        "0\t72\t73\the said yes\the refused",
        "1\t74\t75\tit rains\tit is raining",
        "0\t76\t77\tit rains\tit is dry",
    ],
    "qqp": [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        '0\t1\t2\twhat is "life" ?\twhy live ?\t0',
        "1\t3\t4\twho came ?\twho was it that came ?\t1",
        "2\t5\t6\tis it dry ?\twho came ?\t0",
        "3\t7\t8\tis it dry ?\tis it not wet ?\t1",
    ],
    "stsb": [
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t1\tnone\tnone\ta dog runs\ta dog is running\t4.750",
        "1\tmain\tMSR\t2012\t2\tnone\tnone\ta dog runs\tit rains\t0.000",
        "2\tmain\tMSR\t2012\t3\tnone\tnone\tit rains\tit is wet\t3.200",
        "3\tmain\tMSR\t2012\t4\tnone\tnone\ta cat sat\ta dog sat\t2.500",
    ],
    "mnli": [
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        f"0\t{_MNLI}it rains .\tit is wet .\tentailment\tentailment",
        f"1\t{_MNLI}it rains .\ta dog sat .\tneutral\tneutral",
        f"2\t{_MNLI}it rains .\tit is dry .\tcontradiction\tcontradiction",
        f"3\t{_MNLI}he came .\twho came ?\tneutral\tneutral",
    ],
    "qnli": [
        "index\tquestion\tsentence\tlabel",
        "0\twho came ?\tthe king came .\tentailment",
        "1\twho came ?\tit rains .\tnot_entailment",
        "2\tis it wet ?\tit rains .\tentailment",
        "3\tis it wet ?\tthe king came .\tnot_entailment",
    ],
    "rte": [
        "index\tsentence1\tsentence2\tlabel",
        "0\tit rains .\tit is dry .\tnot_entailment",
        "1\tit rains .\tit is wet .\tentailment",
        "2\the came and the dog sat .\the came .\tentailment",
        "3\tthe dog sat .\the came .\tnot_entailment",
    ],
    "wnli": [
        "index\tsentence1\tsentence2\tlabel",
        "0\tit fell since it was old .\tthe cup was old .\t1",
        "1\tit fell since it was old .\tthe table was old .\t0",
        "2\the said it was dry .\tthe dog was dry .\t0",
        "3\the said it was dry .\the was dry .\t1",
    ],
}
_MNLI_DEV_HEADER = TRAIN_FILES["mnli"][0].replace("label1\t", "label1\tlabel2\tlabel3\tlabel4\tlabel5\t")
_FOUR = "neutral\tneutral\tneutral\tneutral"


def _mnli_dev(*pairs: str) -> list[str]:
    """Held-out rows of MNLI, whose four labels more than in training come before the gold one."""
    golds = ("entailment", "neutral", "contradiction")
    rows = zip(pairs, golds, strict=True)
    return [_MNLI_DEV_HEADER, *(f"{i}\t{_MNLI}{pair}\t{gold}\t{_FOUR}\t{gold}" for i, (pair, gold) in enumerate(rows))]


HELD_OUT_FILES = {
    name: {"dev.tsv": lines[-3:] if name == "cola" else [lines[0], *lines[-3:]]}
    for name, lines in TRAIN_FILES.items()
    if name != "mnli"
} | {
    "mnli": {
        "dev_matched.tsv": _mnli_dev("it rains .\tit is wet .", "he came .\tit is dry .", "it is wet .\tit is dry ."),
        "dev_mismatched.tsv": _mnli_dev("a dog sat .\ta dog was .", "he came .\twho ?", "the king came .\tno ."),
    }
}
_FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "stsb": "STS-B"}


def write_glue(folder: Path) -> None:
    """All nine tasks under `folder`, as the download lays them out."""
    for name, lines in TRAIN_FILES.items():
        task = folder / _FOLDERS.get(name, name.upper())
        task.mkdir(parents=True)
        for file, content in {"train.tsv": lines, **HELD_OUT_FILES[name]}.items():
            (task / file).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")


def write_tokenizer(folder: Path, vocab_size: int = 200) -> None:
    """A WordPiece tokenizer like BERT's, trained on the rows, as `save_pretrained` writes it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(_all_rows(), trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def _all_rows() -> Iterable[str]:
    return (line for lines in TRAIN_FILES.values() for line in lines)
