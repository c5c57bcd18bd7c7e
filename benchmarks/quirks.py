"""The known differences between the original and this project, row by row; benchmarks/fidelity.py prints them.

A row: number in the specification's list of quirks (§8), what the original does, what this project does (*kept* reproduces it,
*mended* does not), the switch between the two where there is one, and the test that holds it (None: the part is to come, or
there is nothing to test).
"""

QUIRKS = [
    ("Q1", "the shipped tower is dropped for stock CLIP", "both", "shipped by default; `vision_tower=PATH`",
     "test_checkpoints::test_the_argument_goes_before_the_tensors_in_the_checkpoint"),
    ("Q2", 'the stop string "" ends every answer', "mended", "",
     "test_assistant::test_stop_strings_end_the_text_and_an_empty_one_does_nothing"),
    ("Q3", "padding moves by a random pixel", "mended", "", "test_images::test_padding_floors_the_offset"),
    ("Q4", "v1.5 loads no 4 or 8 bits, no other class than Mistral's and no base model", "mended: `model_type` names the class; "
     "quantised loading is to come", "", "test_layouts::test_llava_1_5_before_and_after_transformers_took_its_name"),
    ("Q5", "v1.5's vicuna template has one blank more", "kept", "`v1.5:vicuna_v1`, `up:vicuna_v1`",
     "test_conversation::test_v15_strips_messages_and_result_and_upstream_does_not"),
    ("Q6", "prompts are cut silently at 2,048 positions", "kept in `eval.py`, counted", "Python raises",
     "test_evaluation::test_long_prompts_are_cut_with_a_counted_warning"),
    ("Q7", "positions count over padding", "kept where rows are padded left", "", "test_modules::test_decoder_with_left_padding"),
    ("Q8", "features are counted over the batch, the last of several images wins", "mended", "",
     "test_modules::test_one_row_of_images_does_not_depend_on_another_row"),
    ("Q9", "the projector of stage 1 is ignored", "mended", "`convert build --projector FILE`",
     "test_build::test_a_projector_from_stage_1_over_its_base"),
    ("Q10", "v1.0's training begins sequences with `</s>` where the model's path holds \"llama\"", "kept for checkpoints whose tokenizer "
     "files say so, in the order in which transformers reads them; a path says nothing", "`bos_token` in `special_tokens_map.json`, else "
     "in `tokenizer_config.json`", "test_slow_tokenizers::test_the_folders_of_v1s_own_code_give_its_ids_on_600_samples"),
    ("Q11", "v1.0 drops white space beside images; behind an image that ends its turn, v0's labels move by a token", "kept with v1.0's "
     "templates", "`template`", "test_templates::test_v0_labels_as_printed"),
    ("Q12", "stage 1 trains the whole embedding table, text-only rows leak", "mended", "`trainable` in the recipe",
     "test_known_answers::test_stage_1_moves_the_projector_and_the_rows_of_two_tokens"),
    ("Q13", "`conversatons`", "both are read", "", "test_records::test_json_and_jsonl_and_both_spellings"),
    ("Q14", "v1.0 trains on `### Human: ` and asks with `###Human: ` behind a greeting", "kept", "`v1.0:v0` to train, `v1.0:multimodal` to "
     "chat, `v1.0:simple` to evaluate; `template`", "test_templates::test_the_prompts_of_v1_as_text"),
    ("Q15", "v1.0's table says batches of 128, its commands of stages 2 and 3 make 64", "128 in stage 2, 64 in stage 3", "`batch_size`",
     "test_recipes::test_numbers_of_the_stages"),
    ("Q16", "v1.0's config says `use_cache: false`, and one script then decodes without a cache", "mended: there is always a cache", "",
     "test_known_answers::test_greedy_tokens"),
    ("Q17", "v1.0's worker takes 256 patches for granted and cuts prompts from the left", "mended: the tower says how many; a prompt that "
     "is too long is an error", "", "test_generation::test_bad_requests_are_one_sentence"),
    ("Q18", "BiomedCLIP loads in one script only", "no BiomedCLIP tower: an error that asks for one that can be read",
     "`vision_tower=PATH`", "test_checkpoints::test_no_tower_anywhere_asks_for_one"),
    ("Q19", "v1.0's answers keep the prefix \"Assistant: \", for the prompt ends before it", "mended: the prompt opens the answer; "
     "predictions that have the prefix are scored as they are", "`--predictions FILE`",
     "test_processor::test_v1_is_evaluated_with_another_template_where_none_is_named"),
    ("Q20", "evaluation is sampled without a seed", "mended: greedy", "`generation.temperature`, `seed`",
     "test_generation::test_sampled_tokens_depend_on_the_seed_and_on_nothing_beside_them"),
    ("Q21", "two closed accuracies that disagree", "both are reported", "", "test_evaluation::test_a_hand_computed_score"),
    ("Q22", "lists of candidates were never released", "rebuilt from the training rows", "`protocol`",
     "test_evaluation::test_the_whole_of_vqa_rad"),
    ("Q23", "exact match that is none, 32 periods, commas in digits", "kept", "`strict` beside `paper`",
     "test_metrics::test_at_most_32_periods_go_in_one_pass"),
    ("Q24", "counts of open and closed questions exchanged", "mended", "", "test_evaluation::test_a_hand_computed_score"),
    ("Q25", "the generator of instruction data and its clean-up do not fit together", "to come with the curation of data", "", None),
    ("Q26", "the clean-up may drop the turn with `<image>`, and lower-cases abbreviations", "to come with the curation of data", "", None),
    ("Q27", "each figure downloads its article anew, one failure stops all", "to come with the curation of data", "", None),
    ("Q28", "the README names files that do not exist", "nothing here reads them", "", None),
    ("Q29", "the judge of chats is shown `<image>`, `None` and Python's dicts",
     "`None` and dicts kept, as the judge was shown them; `<image>` is taken away, as v1.0 did, unless it is asked for",
     "`judge.image_marker`", "test_judge_prompt::test_the_frame_of_two_answers_is_the_originals"),
    ("Q30", "controller and worker go on after errors", "to come with the server, which has neither", "", None),
    ("Q31", "v1.5's evaluation asks with the wrong template by default", "mended: the template follows the checkpoint", "`--template`",
     "test_processor::test_template_by_model_type"),
    ("Q32", "an unknown tower is silently none", "mended: an error", "", "test_checkpoints::test_no_tower_anywhere_asks_for_one"),
    ("Q33", "deltas with zero `inv_freq`, sums in float16", "kept", "",
     "test_delta::test_a_delta_with_zero_buffers_over_a_base_in_another_dtype"),
    ("Q34", "the directory's name decides class and template", "mended: config.json does", "`template=`",
     "test_processor::test_template_by_model_type"),
]

# What differs and has no number there: the original, here, the switch, the test.
OTHERS = [
    ("an image in an answer: v1.0 learns to say its patch tokens", "no label stands on an image", "",
     "test_templates::test_ids_and_labels_are_the_originals"),
    ("several `<image>` in a turn are one to upstream's training", "they all stay where each has its image", "the record's `image`",
     "test_processor::test_training_example_counts_images"),
    ("an image that no `<image>` marker stands for is dropped without a word, and the text trained on alone",
     "the same, counted and printed; beyond the limit the run does not start", "`data.skip_limit`",
     "test_lost_images::test_beyond_the_limit_the_run_does_not_start"),
    ("a training sample may be cut inside an image", "it is cut before the image", "`max_length`",
     "test_loader::test_cut_never_leaves_part_of_an_image"),
    ("v1.0 replaces a sample whose image is broken by another, drawn at random", "it is skipped, listed and counted", "",
     "test_loader::test_broken_images_are_skipped_and_listed"),
    ("v1.0's stages 2 and 3 average the mean losses of single samples, stage 1 those of pairs: HF's Trainer over micro-batches",
     "kept in the `v1` recipes of stages 2 and 3, exactly; stage 1 and all other recipes weigh every token alike",
     "`loss_weighting`", "test_training_torch::test_fifty_updates_by_sample_are_those_of_hfs_trainer"),
    ("a sample whose counts of ids do not add up teaches nothing, with a line in the log", "the same, counted", "",
     "test_conversation::test_counts_that_do_not_add_up_leave_nothing_supervised"),
    ("v1.0's inference template `v1`, `default` and v1.5's `v0`, `llama_2`, `mpt` and `mmtag` ones", "are not here; `v1.0:v1` is what "
     "`--version v1` trains with", "", "test_templates::test_names_that_originals_use"),
    ("transformers 4.28, with which v1.0 ran, drops white space beside `<s>`, `</s>` and `<unk>` written out in a text, where "
     "`special_tokens_map.json` holds them as strings; what v1.0's code saves for Q10 does", "kept with v1.0's templates", "`template`",
     "test_slow_tokenizers::test_ids_are_the_slow_classs"),
    ("v1.0's `model_vqa.py` appends `### Response:` to a question asked with `simple_legacy`", "kept, for each question", "`template`",
     "test_templates::test_simple_legacy_asks_as_model_vqa_does"),
    ("transformers 4 and 5 split one tokenizer's text differently behind special tokens and images", "`tokenizer.model` as 4's slow "
     "classes, `tokenizer.json` as the file says; where both are there and differ, a warning names both", "",
     "test_tokenizer_json::test_whole_texts_are_transformers"),
    ("v1.0's tokenizer, if it is a fast one, keeps white space beside images", "always the slow one's ids, with which it was trained", "",
     "test_templates::test_white_space_beside_v1s_images_is_dropped"),
    ("grey of more than eight bits is clipped, so that nearly all is white", "divided by a power of two, as `docs/images.md` says", "",
     "test_images::test_grey_of_many_bits_is_scaled_by_its_highest_value"),
    ("floating-point pixels are clipped to 0 … 255", "refused: nobody knows their range", "",
     "test_images::test_bad_sources_are_one_sentence"),
    ("transparency is dropped, and what lies beneath it is seen", "kept; current transformers lays it over white", "",
     "test_images::test_transparency_is_dropped_and_not_laid_over_a_colour"),
    ("an orientation in EXIF is not followed, and that of a TIFF is, by Pillow", "kept", "",
     "test_images::test_an_orientation_in_exif_is_not_followed"),
    ("v1.5 pads a grey image with 114 when it is asked and with the mean colour when it is trained", "always (122, 116, 104)", "",
     "test_images::test_a_grey_image_is_padded_with_the_colour"),
    ("of several frames or pages the first is seen", "the first, or the one that is named", "`FILE#frame=N`", "test_images::test_frames"),
    ("DICOM is not read", "shown through the file's own rescale and window, MONOCHROME1 inverted; `docs/images.md`",
     "the extra `[medical]`", "test_dicom::test_pydicoms_files_are_shown"),
    ("the modes `keep` and `anyres`, and any unknown one stands for `square`", "`pad` and `square`; a call with another is refused, a "
     "config that says `anyres` too", "`image_mode`, `mode`", "test_images::test_bad_modes_and_shapes"),
    ("v1.5's chat fetches an image from the web", "refused: a path, a data URL or an image", "",
     "test_images::test_bad_sources_are_one_sentence"),
    ("v1.5's chat has one image, given at the start", "any number, in any turn", "`/image FILE`",
     "test_chat::test_a_conversation_grows_and_an_image_goes_with_the_next_message_alone"),
    ("transformers' `top_k` of 50 filters every draw, unsaid", "nothing is filtered unless it is asked for", "`top_k=50`",
     "test_sampling::test_warped_logits_equal_transformers"),
    ("`</s>`, `<s>` and `<unk>` written out in a text are those tokens, and `<image>` is an image", "kept; a count of images that does not "
     "fit is an error", "", "test_templates::test_ids_and_labels_are_the_originals"),
    ("a value that is no text is learnt as Python writes it", "numbers are; a record with another, such as `null`, is skipped, listed and "
     "counted", "", "test_conversation::test_bad_conversations"),
]
