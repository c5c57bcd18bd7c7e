"""How people and served models write a right answer, and what only looks like one: the same reader for every kind of question."""

import time

import pytest

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.datasets.slake import read_slake
from llavamed_jax.evaluation.scoring import polarity, reader, score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.strict import is_strictly_right, open_scores, read_choice

# A right answer `{}` in the forms of served models and of people.
FORMS = [
    "{}", " {} \n", "{}.", "{}!", "{} .", "{}…", "{}...", "…{}", "{}。", "{}！", "{}，", "{}；", "**{}**", "**{}.**",
    "*{}*", "__{}__", "***{}***",
    "`{}`", "“{}”", "“{}.”", "\"{}\"", "‘{}’", "'{}'", "«{}»", "「{}」", "『{}』", "({})", "（{}）", "[{}]", "【{}】",
    "*“{}”*", "# {}", "- {}",
    "• {}", "> {}", "— {}", "{} —", "\u200b{}\ufeff", "\\boxed{{{}}}", "$\\boxed{{\\text{{{}}}}}$",
    "<answer>{}</answer>", "<b>{}</b>",
    "Answer: {}", "answer:{}", "Answer：{}", "Answer: {}.", "**Answer:** {}", "**Answer**: {}", "Answer: **{}**",
    "**Answer: {}**",
    "Answer:\n{}", "Answer: “{}”", "Final answer: {}", "### Final Answer\n\n**{}**", "The answer is {}.",
    "The answer is: {}", "the answer is {}",
    "The correct answer is **{}**.", "The answer to the question is {}.", "So the answer is {}.",
    "Therefore, the answer is “{}”.",
    "**The answer is {}.**", "Response: {}", "A: {}", "ASSISTANT: {}", "✅ {}", "{} ✔️", "**Answer**\n{}",
    "Answer - {}", "Answer – {}", "答案：{}", "答案是{}。",
    "答案：**{}**", "正确答案是“{}”。", "回答：{}。",
    "{}, it is visible.", "**{}**, it can be seen.", "“{}”, I think.", "{}—clearly.", "{} – clearly.", "{} - clearly",
    "**{}**—clearly.",
    "{}; it is seen on the image.", "{}. The image shows it.", "{}.\n\nThe finding is visible in the image.",
    "{} (as seen in the image)",
    "{}, as seen in the image.", "{}, because it is bright.", "{}… it is visible.", "Answer: {}. It is visible.",
    "{}\nExplanation: it is bright.",
    "{}: this is clearly visible", "{}, based on the image.", "{}, with high confidence.", "{}，图中可见。",
    "{}。图中可以看到。", "{}——很明显。", "答案是{}，因为图中可见。",
    "\\(\\boxed{{{}}}\\)", "\\[\\boxed{{{}}}\\]", "$$\\boxed{{{}}}$$", "$$\n\\boxed{{\\text{{{}}}}}\n$$", "\\({}\\)", "\\[\n{}\n\\]",
    "Final answer: \\(\\boxed{{{}}}\\)", "The answer is \\(\\boxed{{\\textbf{{{}}}}}\\).", "\\boxed{{\\({}\\)}}",
]  # fmt: skip
# The same in full-width letters, which a table turns.
WIDE = {code: chr(code + 0xFEE0) for code in range(0x21, 0x7F)}
# What none of the forms may make right: beside the other option, these about the right one.
WRONG = ["not {}", "not {}, but another", "isn't {}", "No, not {}", "never {}", "maybe {}", "{} or something else",
         "{} is wrong", "It is not {}", "不是{}", "非{}"]
BOTH = ["{0} … {1}", "{0}…{1}", "{0} {1}", "{0}, {1}", "{0}/{1}", "{0} / {1}", "{0} or {1}", "{0} and {1}", "{0}—{1}",
        "{0}. {1}.", "{0}; {1}", "{0}\n{1}", "{0} ({1})",
        "{0}, no, {1}", "{0}? {1}!", "{0}, or rather {1}", "{0}, but {1}", "{0}。{1}。", "{0}，{1}", "{0}、{1}",
        "{0}或{1}", "{0}, I mean {1}", "{0}… actually {1}"]  # fmt: skip
# What begins like a remark and states the other answer.
STATED = ["{0}. The correct answer is {1}.", "{0}. It is {1}.", "{0}, it could be {1}", "{0}. The patient has {1}.", "{0}, this is {1}",
          "{0}, there are {1}", "{0}. There is also {1}.", "{0}. This image shows {1}.", "{0}. However, {1} is seen.", "{0}; I think {1}",
          "{0}, I think it is {1}", "{0}, as seen in the image, it is {1}", "{0} (it may be {1})", "{0}. It's {1}.", "{0}\nExplanation: it is {1}.",
          "{0}, because the answer is {1}.", "{0}. That was {1}.", "{0}. See {1}.", "{0}. On this image {1} is visible.", "{0}. Clearly {1}.",
          "{0}, which is {1}", "{0}. The correct one: {1}", "{0}. Although {1} is visible.", "{0}，这是{1}", "{0}。答案应该是{1}", "{0}，图中是{1}",
          "{0}，可能是{1}", "{0}。有{1}", "{0}. It is seen in the image. It is {1}.", "{0}, because {1}", "{0}, due to {1}",
          "{0}. Explanation: {1}.", "{0}, since {1} is more likely", "{0}，因为{1}", "{0}，因为是{1}", "{0}, because there is {1}"]  # fmt: skip
REFUSALS = ["No image was provided.", "No idea.", "No answer", "No clear answer can be given.", "No information is available",
            "No further information.", "No one can say.", "no-one", "No, I cannot see any image", "No doubt about it: a fracture is present.",
            "No question, it is broken.", "No way to tell.", "No pictures are attached", "No CT scan was uploaded.", "No. I don't know.",
            "No, I'm not sure.", "No - it is impossible to tell", "No, unclear.", "No, please upload the image.", "No, as an AI I do not judge.",
            "No. The image was not provided.", "No conclusion can be drawn.", "**No image** provided"]  # fmt: skip
ANSWERED = ["No mass is seen.", "No image findings of a fracture.", "No, I cannot see a fracture.", "No, it is not clear.", "No abnormality can be identified",
            "No, the mass is difficult to see.", "No. I do not see any signs of a fracture on this CT scan.", "No - one lung is normal",
            "No, there is no scan abnormality.", "No definite mass."]  # fmt: skip

SAYS_YES = [
    "Yes, there is a mass in the left lung. The nature of the mass cannot be determined from this image alone.",
    "Yes, the image shows a pleural effusion, but the underlying cause cannot be determined.",
    "Yes. The exact cause cannot be determined from this image.", "Yes, but its nature cannot be determined.",
    "Yes, that is correct.", "Yes, based on the image, there is a mass.",
    "Yes, there is a mass but I cannot tell how old it is"]  # fmt: skip
SAYS_NO = ["No, there is no fracture. Soft tissue injury cannot be assessed on an X-ray.",
    "No abnormality is seen. As an AI, I recommend a radiologist's review.",
    "No CT evidence of hemorrhage is displayed.", "No x-ray findings of fracture are included in this view",
    "No images show bleeding", "No details of a fracture are visible", "No data suggest a fracture",
    "No body part is fractured", "No problem is seen.", "No, I don't think so.", "No, that is incorrect.",
    "No response to treatment is seen"]  # fmt: skip
SAYS_NOTHING = ["No access to the image.", "No response", "No content", "No results found",
    "No, sorry, the picture is missing", "No, I need the image.", "No problem! Please ask", "Yes, that is incorrect.",
    "Yes, maybe", "Yes, I doubt it", "Yes, I don't think so", "No, that is correct.", "No images are visible",
    "No data.", "No image in your message", "No, based on the image, I cannot tell.",
    "Yes, well, I'm sorry, but I cannot determine that.", "No chest X-ray was provided.",
    "Yes, but it cannot be determined.", "No reply", "No output", "nobody can say", "No body can say", "No-body knows"]  # fmt: skip
YES_MORE_ZH = ["是的，没有异常。", "有，无积液。", "是的，没有看到骨折", "是的，非常明显", "是的，不规则肿块", "有的，肿块边界不清楚", "有，在左肺或右肺", "是，可能是肺炎", "有肿块",
    "有的，性质不能确定", "有积液，性质不确定"]  # fmt: skip
NO_MORE_ZH = ["不是，是MRI", "不是，是CT图像", "不，是T2加权", "不是，有3个", "没有，看不到肿块。", "没有肿块", "没有，无法看到肿块", "无积液。"]  # fmt: skip
NOTHING_ZH = ["没有图像", "有没有", "有可能", "没有，我不清楚", "没有，看不清", "是，可能不是", "是，也可能", "有，对吗？", "没有提供图像", "无法确定", "没有办法",
    "有，无法判断", "是，不清楚", "不是，抱歉，我无法确定", "没有有", "有或没有", "是右肺", "有肿块吗", "没有肿块吗？", "是，不是", "无关", "有肿块，没有。", "没有把握"]  # fmt: skip


def both(first, second):
    return [text.format(first, second) for text in BOTH]


@pytest.mark.parametrize("gold, other", [("Yes", "No"), ("No", "Yes"), ("yes", "no"), ("NO", "YES")])
def test_yes_and_no_in_every_form(gold, other):
    for form in FORMS:
        for text in (gold, gold.lower(), gold.upper(), gold.translate(WIDE)):
            assert is_strictly_right(form.format(text), gold), form.format(text)
            assert not is_strictly_right(form.format(text), other), form.format(text)
        for text in (*(wrong.format(gold) for wrong in WRONG), *both(gold, other), *both(other, gold)):
            assert not is_strictly_right(form.format(text), gold), form.format(text)


@pytest.mark.parametrize("text, gold, is_right", [
    ("Yes, it is.", "yes", True), ("Yes it is", "yes", True), ("Yes, there is no shift of the midline.", "yes", True),
    ("No, there is no mass.", "no", True), ("No mass is seen.", "no", True),
    ("No - the heart is not enlarged.", "no", True),
    ("Yes and no", "yes", False), ("Yes. No, there is none.", "yes", False), ("no, yes it is", "no", False),
    ("Yes, but no.", "yes", False),
    ("The answer is no, not yes", "no", False), ("Yes is not right", "yes", False), ("Yes or no?", "yes", False),
    ("No, not at all.", "no", True), ("No - not on this image", "no", True), ("No. Not visible.", "no", True),
    ("No, not no", "no", False), ("no not", "no", True), ("Yes, not at all", "yes", False),
    ("~~Yes~~ No", "no", True), ("~~Yes~~ No", "yes", False), ("~~yes~~", "yes", False), ("~~No~~ **Yes**", "yes", True),
    ("<del>yes</del> no", "no", True), ("<del>yes</del>", "yes", False),
    ("<think>\nThere is no mass? No.\n</think>\n\nYes", "yes", True), ("<think>yes", "yes", False),
    ("There is a mass. Yes?\n</think>\n\nNo", "no", True), ("<thinking>no</thinking>yes", "yes", True), ("<think>a</think>no</think>\nyes", "yes", True),
    ("ASSISTANT: Yes", "yes", True),
    ("not at all", "no", False),
    ("normal", "no", False), ("None", "no", False), ("yesterday", "yes", False), ("Nope", "no", False),
    ("There is no mass", "no", False),
    ("", "no", False), ("**", "no", False), ("Answer:", "no", False), ("I think yes", "yes", False),
    ("yes'm", "yes", False), ("no-thing", "no", True),
    ("Yes, not only on the left", "yes", True), ("Yes, not on the left", "yes", False), ("Yes and not only there", "yes", True),
])  # fmt: skip
def test_what_is_read_as_yes_or_no(text, gold, is_right):
    assert is_strictly_right(text, gold) is is_right


def test_a_refusal_is_no_answer():
    """It is unread, counted, and wrong for yes and for no; a "no" about what is seen is an answer."""
    assert [text for text in ANSWERED if polarity.yes_or_no(text) != "no"] == []
    texts = [*REFUSALS, *ANSWERED, "Yes? I cannot tell.", "Yes, but I am unable to view the image.", "maybe"]
    unread = [text for text in texts if text not in ANSWERED]
    assert [text for text in unread if is_strictly_right(text, "no") or is_strictly_right(text, "yes")] == []
    samples = [VqaSample(i, "a.jpg", "?", "No", "CLOSED") for i in range(len(texts))] + [VqaSample("s", "a.jpg", "?", "Left", "CLOSED")]
    said = [{"question_id": sample.question_id, "text": text} for sample, text in zip(samples, [*texts, "Right"], strict=True)]
    result = score.score(AnswerSet(samples, said))
    assert result["n_closed_unread"] == len(unread), "a wrong answer to a question about a side is not unread"
    assert result["paper"]["closed_accuracy_substring"] > 90, "the paper's numbers look for the letters of no"


@pytest.mark.parametrize("texts, read, said", [
    (SAYS_YES, polarity.yes_or_no, "yes"), (SAYS_NO, polarity.yes_or_no, "no"), (SAYS_NOTHING, polarity.yes_or_no, None),
    (YES_MORE_ZH, polarity.chinese, "yes"), (NO_MORE_ZH, polarity.chinese, "no"), (NOTHING_ZH, polarity.chinese, None)])
def test_only_the_first_clause_behind_yes_or_no_refuses(texts, read, said):
    assert [(text, read(text)) for text in texts if read(text) != said] == []


@pytest.mark.parametrize("gold, other", [("left lung", "right lung"), ("CT", "MRI"), ("Pneumonia", "tuberculosis"), ("2", "3"), ("左肺", "右肺")])
def test_a_second_answer_is_no_remark(gold, other):
    assert [form for form in STATED if open_scores(form.format(gold, other), gold)[0]] == []
    assert [form for form in STATED if open_scores(form.format(gold, other), other)[0]] == []


@pytest.mark.parametrize("text, gold, is_right", [
    ("Pneumonia, because there is consolidation with air bronchograms.", "Pneumonia", True),
    ("Pneumonia, because there are patchy opacities", "Pneumonia", True),
    ("CT, because it is a cross-sectional image", "CT", True), ("CT, as seen in the CT image", "CT", True),
    ("Left lung, because right lung", "Left lung", False), ("Left lung, due to the right lung", "Left lung", False),
    ("Left lung. Explanation: right lung.", "Left lung", False),
    ("Pneumonia. Explanation: tuberculosis.", "Pneumonia", False),
    ("Pneumonia, since tuberculosis is more likely", "Pneumonia", False), ("左肺，因为是右肺", "左肺", False),
    ("Pneumonia, because of patchy opacities", "Pneumonia", True),
    ("CT, because the CT image shows bright bone", "CT", True), ("CT, because the MRI shows bright bone", "CT", False),
    ("Left lung, because there is an opacity on the left", "Left lung", True),
    ("Left lung, because there is an opacity on the right", "Left lung", False),
    ("Pneumonia, because there is tuberculosis", "Pneumonia", False),
    ("Axial, because it is a coronal image", "Axial", False), ("2, because 3 are visible", "2", False),
    ("左肺，因为左侧可见高密度影", "左肺", True), ("左肺，因为右侧可见高密度影", "左肺", False),
    ("X-Ray, because the radiograph shows the chest", "X-Ray", True),
    ("Lung, because it is a heart image", "Lung", False)])  # fmt: skip
def test_a_reason_tells_how_something_looks(text, gold, is_right):
    assert open_scores(text, gold)[0] is is_right


YES_ZH, NO_ZH = ["是", "是的", "存在", "包含", "包括", "有", "可以", "对", "对的"], ["不是", "不是的", "不存在", "不包含", "不包括", "没有", "无", "否", "不"]


@pytest.mark.parametrize("same, others", [(YES_ZH, NO_ZH), (NO_ZH, YES_ZH)])
def test_chinese_words_for_yes_are_one_answer(same, others):
    forms = ("{}", "{}。", "**{}**", "答案是{}。", "{}，右侧有异常。", "{}。右肺较大。", "{}，图中可见。", "{}（如图所示）")
    for gold in same:
        assert [form.format(text) for form in forms for text in same if not is_strictly_right(form.format(text), gold)] == []
        texts = [form.format(text) for form in forms for text in others] + both(gold, others[0]) + both(others[0], gold)
        texts += [wrong.format(gold) for wrong in WRONG] + [f"{gold}的右肺", f"是{gold}", f"{gold}，我无法确定", f"{gold}吗", f"{gold}，但我不知道", "右肺", ""]
        assert [text for text in texts if text.replace(" ", "") not in same and is_strictly_right(text, gold)] == []
    assert not is_strictly_right("是", "都是") and is_strictly_right("都是", "都是") and not is_strictly_right("是", "Yes")


@pytest.mark.parametrize("text, gold, is_right", [
    ("hepatitis", "Hepatitis A", False), ("hepatitis a", "Hepatitis A", True), ("Hepatitis A", "hepatitis a", True), ("group streptococcus", "group A streptococcus", False),
    ("group a streptococcus", "Group A Streptococcus", True), ("streptococcus, group A", "Streptococcus group A", True), ("protein a deficiency", "Protein A deficiency", True),
    ("vitamin deficiency", "vitamin a deficiency", False), ("fibers", "A-fibers", False), ("hepatitis virus", "Hepatitis-A virus", False), ("A mass", "mass", True),
    ("a mass in a lung", "Mass in the lung", True), ("Removal of A Polyp", "removal of a polyp", True), ("A MASS IN A LUNG", "mass in lung", True), ("The left lung.", "left lung", True),
    ("an", "the", False), ("a a", "a", False), ("the (left) lung", "left lung", True)])  # fmt: skip
def test_an_a_that_is_a_name_is_no_article(text, gold, is_right):
    assert open_scores(text, gold)[0] is is_right
    assert open_scores(gold, text)[0] is is_right


def test_an_a_that_is_a_name_parts_options():
    three = ("Hepatitis A", "Hepatitis B", "Hepatitis")
    assert read_choice("hemophilia", ("Hemophilia A", "Hemophilia B")) is None
    assert [read_choice(text, three) for text in ("Hepatitis A", "A. Hepatitis A", "C. Hepatitis", "hepatitis a", "hepatitis")] == [0, 0, 2, 0, 2]
    assert read_choice("B", ("A:B", "B:A")) == 1 and read_choice("B:A", ("A:B", "B:A")) == 1


@pytest.mark.parametrize("instruction, place", [("Answer with the letter of the right option.", 1),
                                                ("Answer with the option's letter from the given choices directly.", 1), ("Name the letter?\nWhich one?", None)])
def test_a_letter_is_the_option_if_the_prompt_asks_for_it(instruction, place):
    sample = VqaSample(1, "a.jpg", f"Which?\nA. B\nB. A\n{instruction}", "A", "CHOICE", options=("B", "A"), right=1)
    for text in ("B", "**B**", "Answer: B.", "\\(\\boxed{B}\\)"):
        assert AnswerSet([sample], [{"question_id": 1, "text": text}]).choices == {0: place}


@pytest.mark.parametrize("language, count", [("en", 1053), ("zh", 41)])
def test_slakes_golds_are_right_in_every_form_and_nothing_else_is(shared, language, count):
    """100 and 0: `closed_accuracy` and `open_exact` of SLAKE's validation questions."""
    samples = read_slake(shared / "data" / "slake", "validation", language)
    assert len(samples) == count
    kinds = {"CLOSED": is_strictly_right, "OPEN": lambda text, gold: open_scores(text, gold)[0]}
    pairs = sorted({(sample.answer_type, sample.answer) for sample in samples})
    for form in FORMS:
        for kind, gold in pairs:
            if form == "> {}" and gold.isdecimal():
                continue  # greater than 3, and not a quotation of 3
            assert kinds[kind](form.format(gold), gold), (form, gold)
            assert kinds[kind](form.format(gold.translate(WIDE)), gold), (form, gold)
            assert open_scores(form.format(gold), gold)[1] == 1
    golds = {kind: sorted({gold.lower() for of, gold in pairs if of == kind}) for kind in kinds}
    for number, (kind, gold) in enumerate(pairs):
        opposite = {"yes": "no", "no": "yes"}.get(polarity.of_gold(gold) if kind == "CLOSED" else "")
        others = [each for each in golds[kind] if opposite in (None, polarity.of_gold(each))]
        others = [each for each in others if reader.comparable(reader.clean(each)) != reader.comparable(reader.clean(gold))]
        chosen = [others[(7 * number + i) % len(others)] for i in range(3)]
        chosen = [{"yes": "no", "no": "yes"}[gold.lower()]] if gold.lower() in ("yes", "no") else chosen
        texts = [*chosen, *(wrong.format(gold) for wrong in WRONG), *both(gold, chosen[0]), *both(chosen[0], gold)]
        stated = [] if kind == "CLOSED" and polarity.of_gold(gold) else [each for each in STATED if "Explanation" not in each]
        assert [each for each in stated if kinds[kind](each.format(gold, chosen[0]), gold)] == [], (gold, chosen[0])
        if gold.lower() not in ("yes", "no"):
            texts += [f"No, {gold}", f"No, it is not {gold}", f"Yes, {gold}"]
        for text in texts:
            if (said := reader.comparable(reader.clean(text))) in golds[kind] or text in golds[kind] or said.split() == ["0"]:
                continue  # "left lung" and "right" are together another gold, and would be one that is written
            for form in ("{}", "**{}**", "“{}”", "Answer: {}", "The answer is {}.", "{}。", "{}…", "{}—clearly.",
                         "**{}**, there is one."):
                assert not kinds[kind](form.format(text), gold), (form, text, gold)


def test_the_score_of_slake_is_100_and_0(shared):
    samples = read_slake(shared / "data" / "slake", "validation")
    for form in ("**{}**", "“{}”", "Answer: {}", "{}。", "The answer is {}.", "{}—clearly."):
        said = [{"question_id": s.question_id, "text": form.format(s.answer)} for s in samples]
        strict = score.score(AnswerSet(samples, said))["strict"]
        assert (strict["closed_accuracy"], strict["open_exact"], strict["open_f1"]) == (100, 100, 100)
        wrong = [{"question_id": s.question_id, "text": form.format(f"not {s.answer}")} for s in samples]
        strict = score.score(AnswerSet(samples, wrong))["strict"]
        assert (strict["closed_accuracy"], strict["open_exact"]) == (0, 0)


def test_choices_are_read_in_every_form_without_a_remark():
    options = ("liver", "left lung", "T2*", "heart")
    forms = [form for form in FORMS if not any(word in form for word in ("there", "clearly", "image", "visible",
                                                                         "bright", "confidence", "seen", "think"))]
    forms = [form for form in forms if not any(word in form for word in ("有", "很", "图", "A: ", "ASS"))]
    assert len(forms) > 60
    for form in forms:
        for text in ("B", "b", "left lung", "Left Lung", "B. left lung", "(B) left lung", "B：left lung",
                     "B – left lung", "B (left lung)", "B; left lung"):
            assert read_choice(form.format(text), options) == 1, form.format(text)
        for text in ("B or C", "A, B", "not B", "B. liver", "left lung and liver", "E", "No"):
            assert read_choice(form.format(text), options) is None, form.format(text)
    assert read_choice("A: left lung", options) is None, "letter and text of two options"
    assert read_choice("A: liver", options) == 0 and read_choice("**A**: liver", options) == 0
    assert read_choice("A - left lung", options) is read_choice("A (left lung)", options) is None
    assert read_choice("C-arm", ("arm", "C-arm")) == 1 and read_choice("B - arm", ("arm", "b-arm")) is None
    assert read_choice("T2*", options) == 2 and read_choice("**T2***", options) == 2
    assert read_choice("选B", options) == read_choice("答案：B。", options) == read_choice("Ｂ、left lung",
                                                                                      options) == 1


@pytest.mark.parametrize("text, gold, is_right", [
    ("X‑ray", "X-Ray", True), ("x ray", "X-Ray", True), ("X–Ray", "X-Ray", True), ("T2*", "T2", False),
    ("T2", "T2*", False), ("3.5 cm", "3", False),
    ("3.", "3", True), ("three", "3", True), ("Lung, Heart", "Lung", False),
    ("Lung, which is the biggest", "Lung", False), ("Lung, which is seen on the CT scan", "Lung", True),
    ("CT, as seen on the MRI", "CT", False), ("CT, as seen in the image", "CT", True),
    ("Lung. Heart is next to it.", "Lung", False), ("Lung, because air is seen. The answer is the heart.", "Lung", False),
    ("Lung, because " + "it is dark " * 200, "Lung", False), ("Lung. Not the heart.", "Lung", False),
    ("Lung, as well as the heart", "Lung", False),
    ("Lung; it is not the heart but it", "Lung", False), ("the left lung", "left lung", True),
    ("Left", "left lung", False),
    ("doesn’t enhance", "doesn't enhance", True), ("größer", "gro\u0308ßer", True), ("左肺、心脏", "左肺，心脏", True),
    ("是不是", "是", False), ("是的", "是", False),
    ("~~liver~~ lung", "lung", True), ("~~lung~~", "lung", False), ("~~lung~~ liver", "lung", False),
    ("~5 mm", "5 mm", False), ("<think>liver?</think> Lung", "lung", True), ("The liver?\n</think>\nLung", "lung", True),
    ("Lung. That is wrong.", "Lung", False), ("Lung, which is incorrect", "Lung", False), ("Lung. This is correct.", "Lung", True),
    ("Left. This is right.", "Left", False),
    ("no evidence of it, " * 60 + "none", "no evidence of it, " * 60 + "none", True),
    ("left lung and heart " * 30 + "too, which is seen", "left lung and heart " * 30 + "too", True),
])  # fmt: skip
def test_open_answers_are_read_and_not_guessed(text, gold, is_right):
    assert open_scores(text, gold)[0] is is_right


SIGNS = [("<5 cm", "< 5 cm"), (">5 cm", "> 5 cm"), ("5 cm", "+5 cm"), ("≤5 cm", "<= 5 cm"), ("≥5 cm", ">=5 cm"), ("-5", "\u22125"), ("5", "+5"),
         ("<-5", "< \u22125"), ("T2", "T2."), ("T2+", "T2 +"), ("T2-", "T2\u2212"), ("3+", "3+."), ("3", "three"), ("2+", "2 +"), ("ER+, PR-", "er+/pr-"),
         ("ER-, PR+", "ER\u2011 / PR+"), ("ER+, PR+", "ER +, PR +"), ("L>R", "L > R"), ("L<R", "L < R"), ("CD4- cells", "CD4\u207b cells"),
         ("CD4+ cells", "CD4\u207a cells"), ("A+", "a+"), ("A-", "a-"), ("size <5 mm", "size < 5 mm"), ("size >5 mm", "size>5 mm")]


@pytest.mark.parametrize("number", range(len(SIGNS)))
def test_signs_that_carry_meaning_are_kept(number):
    """Each is right for its own spelling, in every form, and wrong for all others; as an option and as an open answer."""
    gold, same = SIGNS[number]
    others = [each for each in {first: None for first, _ in SIGNS} if each != gold]
    assert all(reader.plain(each) == reader.plain(gold) for each in (same, gold.translate(WIDE)))
    forms = ("{}", "**{}**", "“{}”", "({})", "Answer: {}", "The answer is {}.", "{}, because it is seen.", "{} — clearly.")
    for form in forms[:4] if gold == "A-" else forms:  # a minus behind a single letter counts if nothing else is said
        assert open_scores(form.format(same), gold) == (True, 1), (form, same)
        wrong = [each for each in others if open_scores(form.format(gold), each)[0]]
        assert not wrong, (form, gold)
    if gold not in ("A+", "A-"):
        assert read_choice(gold, ("x", *others, same)) == len(others) + 1
        assert read_choice(f"B. {gold}", ("x", same, others[0])) == 1


@pytest.mark.parametrize("text, gold, is_right", [
    ("X-ray", "X ray", True), ("L4-5", "L4–5", True), ("3-5 cm", "3 5 cm", True), ("T2-weighted", "T2 weighted", True), ("T2- weighted", "T2-weighted", True),
    ("C5- C6", "C5-C6", True), ("L4- L5", "L4-L5", True), ("T1- and T2 weighted", "T1 and T2 weighted", True), ("T2- FLAIR", "T2 FLAIR", True), ("L4-", "L4", True),
    ("- 5", "5", True), ("+ liver", "liver", True), ("> liver", "liver", True), ("liver -> lung", "liver lung", True), ("CT + MRI", "CT MRI", True),
    ("CT+MRI", "CT MRI", True), ("lung- it is seen", "lung", True), ("lung -", "lung", True), ("T2— it is seen", "T2", True), ("3 -5", "3-5", True),
    ("-0.5", "0.5", False), ("<.5", ".5", False), ("~<5", "<5", False), ("no <b>mass</b>", "no mass", True), ("T2+, not seen", "T2", False)])
def test_other_dashes_and_marks_still_say_nothing(text, gold, is_right):
    assert open_scores(text, gold)[0] is is_right


def test_the_papers_numbers_know_no_signs():
    samples = [VqaSample(1, "a.jpg", "?", "<5 cm", "OPEN")]
    result = score.score(AnswerSet(samples, [{"question_id": 1, "text": ">5 cm"}]))
    assert result["paper"]["recall"] == 100 and result["strict"]["open_exact"] == 0 and result["strict"]["open_f1"] == 50


@pytest.mark.parametrize("gold", ["A", "the", "", "an", "  ", "+", "?", "...", "a.", "The", "**", "“”"])
@pytest.mark.parametrize("text", ["", " ", "the", "A", "left", "...", "**"])
def test_an_empty_answer_is_never_right(gold, text):
    """A gold that the VQA evaluation's rules take to nothing is compared as it stands; an empty answer is no answer."""
    is_same = gold.strip() != "" and reader.clean(text).lower() == reader.clean(gold).lower() != ""
    sample = VqaSample(1, "a.jpg", "?", gold, "OPEN")
    strict = score.score(AnswerSet([sample], [{"question_id": 1, "text": text}]))["strict"]
    assert strict["open_exact"] == strict["open_f1"] == (100 if is_same else 0)
    assert is_strictly_right(text, gold) == is_same


def test_the_papers_metrics_know_no_reader():
    """They are the original's: what stands in the text is compared, its stars and quotation marks too."""
    samples = [VqaSample(1, "a.jpg", "?", "left", "OPEN"), VqaSample(2, "b.jpg", "?", "A", "OPEN"),
               VqaSample(3, "b.jpg", "?", "是", "CLOSED")]
    texts = {1: "**left**", 2: "", 3: "“是”"}
    result = score.score(AnswerSet(samples, [{"question_id": number, "text": text} for number, text in texts.items()]))
    assert result["strict"]["open_exact"] == 50 and result["strict"]["closed_accuracy"] == 100
    assert result["paper"]["recall"] == result["paper"]["exact_match"] == 0
    assert result["paper"]["open_accuracy_substring"] == 100, "the empty text is in every text"
    assert result["paper"]["closed_recall"] == 0 and result["paper"]["closed_accuracy_substring"] == 100


@pytest.mark.parametrize("text", [
    "*" * 20_000, "* " * 20_000, "(" * 20_000, "yes " * 8_000, "yes, there " * 4_000, "\\boxed{" * 3_600, "- " * 20_000, "'" * 20_000,
    "Answer: " * 4_000, ". " * 20_000, "<b>" * 8_000, "__a" * 8_000, "~~a" * 8_000, "<del>" * 8_000, "<think>" * 8_000, " " * 20_000 + "x",
    ". " * 20_000 + "x", "\n " * 20_000 + "x", "yes" + " ." * 20_000 + "x", "(" * 8_000 + ")" * 8_000])
def test_a_long_answer_takes_no_time(text):
    begun = time.process_time()
    assert read_choice(text, ("a", "b")) is None and not is_strictly_right(text, "left lung")
    open_scores(text, "left lung"), open_scores(text, "yes"), is_strictly_right(text, "yes")
    assert time.process_time() - begun < 2


@pytest.mark.parametrize("text, gold, is_exact, f1", [
    ("左肺下叶", "左肺", False, 4 / 6), ("左 肺", "左肺", True, 1), ("ＣＴ 扫描。", "CT扫描", True, 1), ("答案是：左肺。", "左肺", True, 1),
    ("右肺", "左肺", False, 1 / 2), ("肺肺肺", "左肺", False, 2 / 5), ("MRI 成像", "CT成像", False, 4 / 6), ("心脏、肝脏", "心脏,肝脏", True, 1),
    ("左肺 upper lobe", "左肺", False, 4 / 6), ("", "左肺", False, 0), ("left lung", "left lower lung", False, 4 / 5)])
def test_chinese_answers_are_compared_by_characters(text, gold, is_exact, f1):
    assert open_scores(text, gold) == (is_exact, pytest.approx(f1))
