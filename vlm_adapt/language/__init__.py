"""Language models of transformers behind one seam: causal and encoder-decoder.

A new kind of language is one file and one line here.
"""

from vlm_adapt.choices import Choices

LANGUAGES = Choices(
    "kind of language model",
    {
        "causal": "vlm_adapt.language.causal:CausalLanguage",
        "seq2seq": "vlm_adapt.language.seq2seq:Seq2SeqLanguage",
    },
)
