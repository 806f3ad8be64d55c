"""Types that transformers knows and the zoo does not build, with the reason."""

from __future__ import annotations

REASONS: dict[str, str] = {
    "the configuration of a part of another type: no Auto class builds a model of it": """
        aimv2_text_model align_text_model align_vision_model altclip_text_model altclip_vision_model
        apertus1p5_vision_tokenizer blip_2_vision_model blip_text_model blip_vision_model
        blt_global_transformer blt_local_decoder blt_local_encoder blt_patcher bridgetower_text_model
        bridgetower_vision_model canary_decoder chameleon_vqgan chinese_clip_text_model clap_audio_model
        clap_text_model clipseg_text_model clipseg_vision_model clvp_decoder clvp_encoder
        csm_depth_decoder_model deepseek_ocr2_encoder deepseek_ocr2_sam_vision_model deepseek_ocr2_text
        deepseek_ocr2_vision dia_decoder dia_encoder diffusion_gemma_text dots3_note_audio_encoder
        dots3_note_vision_encoder edgetam_mask_decoder edgetam_prompt_encoder edgetam_video_mask_decoder
        edgetam_video_prompt_encoder emu3_text_model emu3_vqgan ernie4_5_vl_moe_text ernie4_5_vl_moe_vision
        esmfold2 fastspeech2_conformer_hifigan flava_image_codebook flava_image_model flava_multimodal_model
        flava_text_model florence_vision gemma4_unified_audio gemma4_unified_vision git_vision_model
        got_ocr2_vision granite4_vision_text granite_speech_encoder granite_speech_plus_encoder
        groupvit_text_model groupvit_vision_model idefics2_perceiver idefics2_vision idefics_perciever
        idefics_vision inkling_audio inkling_vision instructblip_qformer instructblip_vision_model
        instructblipvideo_qformer instructblipvideo_vision_model janus_vision_model janus_vqgan
        kosmos_2_5_text_model kosmos_2_5_vision_model kosmos_2_text_model kosmos_2_vision_model layoutxlm
        llama4_vision_model metaclip_2_text_model metaclip_2_vision_model minicpmv4_6_vision
        minimax_m3_vl_vision mllama_text_model mllama_vision_model molmo2_adapter molmo2_vision
        moonshine_streaming_encoder moshi_depth musicgen_decoder musicgen_melody_decoder nougat ovis2_vision
        owlv2_text_model owlv2_vision_model owlvit_text_model owlvit_vision_model paddleocr_vl_text
        paddleocr_vl_vision phi4_multimodal_audio phi4_multimodal_vision pix2struct_text_model
        pix2struct_vision_model pp_chart2table_vision pp_formulanet_text pp_formulanet_vision
        qwen2_5_omni_audio_encoder qwen2_5_omni_bigvgan qwen2_5_omni_dit qwen2_5_omni_talker qwen2_5_omni_text
        qwen2_5_omni_token2wav qwen2_5_omni_vision_encoder qwen2_vl_vision qwen3_omni_moe_audio_encoder
        qwen3_omni_moe_talker_code_predictor qwen3_omni_moe_talker_text qwen3_omni_moe_text
        qwen3_omni_moe_vision_encoder rag sam2_mask_decoder sam2_prompt_encoder sam2_video_mask_decoder
        sam2_video_prompt_encoder sam3_detr_decoder sam3_detr_encoder sam3_geometry_encoder
        sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder sam3_lite_text_geometry_encoder
        sam3_lite_text_mask_decoder sam3_mask_decoder sam3_tracker_mask_decoder sam3_tracker_prompt_encoder
        sam3_tracker_video_mask_decoder sam3_tracker_video_prompt_encoder sam_hq_mask_decoder
        sam_hq_prompt_encoder sam_mask_decoder sam_prompt_encoder sapiens2_head siglip2_text_model
        siglip_text_model slanext_vision speecht5_hifigan step3p5 step3p5_vision t5_gemma_module
        t5gemma2_decoder t5gemma2_text unlimited_ocr_sam_vision_model unlimited_ocr_text unlimited_ocr_vision
        unlimited_ocr_vision_encoder vibevoice_diffusion videoprism_text_model xclip_text_model
        xclip_vision_model EvollaModel
    """,
    "needs timm": """
        edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision omdet-turbo pe_audio_video
        pe_audio_video_encoder pe_video pe_video_encoder perception_lm timm_backbone timm_wrapper
    """,
    "needs natten": """
        dinat
    """,
    "needs detectron2": """
        layoutlmv2
    """,
    "needs torchaudio": """
        higgs_audio_v2_tokenizer
    """,
    "its sizes depend on each other: made small by rule, it cannot be built": """
        apertus1p5 chameleon cohere_compass cohere_compass_text d_fine deepseek_ocr2 diffusion_gemma
        dots3_note efficientloftr emu3 ernie4_5_vl_moe fun_asr_nano gemma4_assistant glm5_next glm5_next_text
        gradium_phonon_tts granite4_vision hunyuan_vl hunyuan_vl_text hy_v4_vl hy_v4_vl_text llama4 lw_detr
        lw_detr_vit molmo2 moonshine_streaming muse_spark muse_spark_audio nemo_speechlm
        nemotron3_5_transcribe_audio nemotron3_diarization nemotron_h_omni pocket_tts
        pocket_tts_audio_tokenizer pp_ocrv5_server_det pp_ocrv6_medium_det qwen3_omni_moe qwen4_exp
        qwen4_exp_text t5gemma2_encoder vitmatte vitpose_backbone wavtokenizer mimi_decoder
        pocket_tts_audio_tokenizer_decoder wavtokenizer_encoder
    """,
    "its sizes have names of their own: made small by rule, it still has millions of weights": """
        align bark blt chmv2 deimv2 depth_pro dots3_note_text edgetam_video fastspeech2_conformer_with_hifigan
        janus musicgen_melody neucodec pe_audio pe_audio_encoder pp_doclayout_v2 pp_doclayout_v3
        pp_doclayout_v4 pp_ocrv5_server_rec qwen2_5_omni sam2 sam2_hiera_det_model sam2_video
        sam2_vision_model sam3_tracker_video tipsv2_dpt tvp univnet vibevoice vibevoice_acoustic_tokenizer
        vibevoice_asr xcodec xcodec2 mimi_encoder vibevoice_acoustic_tokenizer_decoder
        vibevoice_acoustic_tokenizer_encoder
    """,
    "takes inputs of its own: it is built by rule, but does not run on those that the zoo has": """
        audioflamingo3_encoder autoformer bailing_hybrid blip_2_qformer clvp cosmos3_edge_vision
        fun_asr_nano_encoder gemma3n_audio gemma4_unified_assistant gemma4_vision glm_image_vision
        glm_image_vqmodel granite_speech5_ctc granite_speech5_encoder hunyuan_vl_vision hy_v4_vl_vision
        idefics informer inkling2_vision instructblip instructblipvideo jev kimi_k25_vision kosmos-2
        minicpm_ocr_vision minicpmv4_7_vision mistral4 mobilevitv2 muse_glimmer_assistant oneformer
        patchtsmixer pi0 pp_ocrv5_mobile_det pp_ocrv5_mobile_rec pp_ocrv6_small_det prompt_depth_anything
        qwen3_asr_encoder rt_detr rt_detr_v2 sam3 sam3_lite_text sam3_tracker sam3_video sam_hq seggpt
        siglip2_vision_model slanet step3p7 superglue time_series_transformer udop upernet uvdoc
        video_llama_3_vision videoprism videoprism_vision_model voxtral_realtime voxtral_realtime_text xclip
        zamba
    """,
}
LEFT_OUT: dict[str, str] = {name: reason for reason, names in REASONS.items() for name in names.split()}
