"""Usual names of the columns of a data set, the likelier first; case does not matter."""

# of the rows of instruction files (P3, promptsource, FLAN, Alpaca)
INSTRUCTIONS = ("instruction", "definition")
INPUTS = ("inputs_pretokenized", "inputs", "input", "prompt", "source", "context", "passage")
TARGETS = ("targets_pretokenized", "targets", "target", "outputs", "output", "completion")
TARGETS += ("response", "answers", "answer", "label")
OPTIONS = ("options", "answer_choices", "choices")

# of the rows of a user's own
QUESTIONS = ("question", "query")
CONTEXTS = ("context", "passage", "paragraph", "background", "input", "inputs")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"))
OWN_INPUTS = ("inputs_pretokenized", "inputs", "input", "prompt", "source", "text", "sentence")
OWN_INPUTS += ("document", "article", "dialogue", "dialog", "review", "content", "message")
OWN_INPUTS += ("context", "passage")
OWN_TARGETS = ("targets_pretokenized", "targets", "target", "outputs", "output", "completion")
OWN_TARGETS += ("response", "answers", "answer", "answerkey", "correct_answer", "label_text")
OWN_TARGETS += ("label", "labels", "summary", "highlights", "translation", "sentiment", "category")
OWN_TARGETS += ("class", "intent", "reply", "solution")
TEXTS = ("text", "content", "body", "document", "article", "passage")
