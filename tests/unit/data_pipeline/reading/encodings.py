"""Texts of several languages, encoders for each encoding of the web, and page heads that declare one."""

import unicodedata

RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему."


KOREAN = "나라의 말이 중국과 달라 한자와는 서로 통하지 아니하므로"


JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。"


SIMPLIFIED = "话说天下大势，分久必合，合久必分。"


TRADITIONAL = "話說天下大勢，分久必合，合久必分。"


FRENCH = "Longtemps, je me suis couché de bonne heure ; à peine ma bougie éteinte, mes yeux se fermaient déjà."


GREEK = "Άνδρα μοι έννεπε, Μούσα, πολύτροπον, ος μάλα πολλά"


HEBREW = "בראשית ברא אלהים את השמים ואת הארץ"


ARABIC = "كان يا ما كان في قديم الزمان"


THAI = "กาลครั้งหนึ่งนานมาแล้ว มีชายคนหนึ่ง"


TURKISH = "Bir varmış bir yokmuş, evvel zaman içinde güneşli bir ülkede çağlayan ırmaklar varmış."


POLISH = "Litwo! Ojczyzno moja! ty jesteś jak zdrowie; ile cię trzeba cenić, ten tylko się dowie, kto cię stracił."


LATVIAN = "Reiz dzīvoja vecs vīrs, kam bija trīs dēli, un jaunākais bija ļoti gudrs zēns."


VIETNAMESE = "Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau."


MALTESE = "Għandi tliet aħwa u oħt waħda żgħira, u noqogħdu f'raħal ċkejken."


NORTHERN_SAMI = "Mun lean sápmelaš ja mun orun Kárášjogas, gos eallit bohccot."


WELSH = "Mae'r tŷ ar lan y dŵr, a'r ŵydd yn nofio."


ROMANIAN = "A fost odată ca-n povești, a fost ca niciodată, din rude mari împărătești, o prea frumoasă fată."


UKRAINIAN = "Реве та стогне Дніпр широкий, сердитий вітер завива, їх ґанок"


# (label in a page, Python's codec, text).
ENCODED = [
    ("utf-8", "utf-8", RUSSIAN),
    ("UTF8", "utf-8", JAPANESE),
    ("ibm866", "cp866", RUSSIAN),
    ("iso-8859-2", "iso8859_2", POLISH),
    ("latin2", "iso8859_2", POLISH),
    ("iso-8859-3", "iso8859_3", MALTESE),
    ("iso-8859-4", "iso8859_4", LATVIAN),
    ("iso-8859-5", "iso8859_5", RUSSIAN),
    ("iso-8859-6", "iso8859_6", ARABIC),
    ("iso-8859-7", "iso8859_7", GREEK),
    ("iso-8859-8", "iso8859_8", HEBREW),
    ("iso-8859-8-i", "iso8859_8", HEBREW),
    ("iso-8859-9", "cp1254", TURKISH + " “gül”"),
    ("iso-8859-10", "iso8859_10", NORTHERN_SAMI),
    ("iso-8859-13", "iso8859_13", LATVIAN),
    ("iso-8859-14", "iso8859_14", WELSH),
    ("iso-8859-15", "iso8859_15", FRENCH + " Le cœur coûte 5 €."),
    ("iso-8859-16", "iso8859_16", ROMANIAN),
    ("koi8-r", "koi8_r", RUSSIAN),
    ("koi8-u", "koi8_u", UKRAINIAN),
    ("macintosh", "mac_roman", FRENCH + " “cœur”"),
    ("x-mac-cyrillic", "mac_cyrillic", RUSSIAN),
    ("windows-874", "cp874", THAI + " “ไทย”…"),
    ("tis-620", "tis_620", THAI),
    ("windows-1250", "cp1250", POLISH),
    ("windows-1251", "cp1251", RUSSIAN),
    ("cp1251", "cp1251", UKRAINIAN),
    ("windows-1252", "cp1252", FRENCH + " “€”"),
    ("iso-8859-1", "cp1252", FRENCH + " It’s “so” – really…"),
    ("us-ascii", "cp1252", FRENCH),
    ("windows-1253", "cp1253", GREEK),
    ("windows-1254", "cp1254", TURKISH),
    ("windows-1255", "cp1255", HEBREW),
    ("windows-1256", "cp1256", ARABIC),
    ("windows-1257", "cp1257", LATVIAN),
    ("windows-1258", "cp1258", VIETNAMESE),
    ("gb2312", "gbk", SIMPLIFIED + "朱镕基"),  # the name has a character that GB 2312 lacks
    ("GBK", "gbk", SIMPLIFIED),
    ("gb18030", "gb18030", SIMPLIFIED + "㐀"),
    ("hz-gb-2312", "hz", SIMPLIFIED),
    ("big5", "big5", TRADITIONAL),
    ("Big5-HKSCS", "big5hkscs", TRADITIONAL + "嘅咗"),
    ("euc-jp", "euc_jp", JAPANESE),
    ("iso-2022-jp", "iso2022_jp", JAPANESE),
    ("shift_jis", "cp932", JAPANESE + "①㈱髙"),
    ("Shift_JIS-2004", "shift_jis_2004", JAPANESE + "𠮟鷗"),
    ("x-euc-jisx0213", "euc_jisx0213", JAPANESE + "鷗"),
    ("iso-2022-jp-2", "iso2022_jp_2", JAPANESE + "한국"),
    ("x-mac-ce", "mac_latin2", POLISH),
    ("x-mac-croatian", "mac_croatian", "Čovječe, šuma žuta, đak i ćup."),
    ("ibm-856", "cp856", HEBREW),
    ("win-1251;", "cp1251", RUSSIAN),
    ("x-sjis", "cp932", JAPANESE),
    ("euc-kr", "euc_kr", KOREAN),
    ("ks_c_5601-1987", "cp949", KOREAN + " 펲시맨 똠방각하"),
    ("windows-949", "cp949", KOREAN),
    ("iso-2022-kr", "iso2022_kr", KOREAN),
    ("uhc", "cp949", KOREAN + " 똠방각하"),  # this label and the next are not in the standard
    ("cp852", "cp852", POLISH),
    ("utf-7", "utf-7", RUSSIAN),
]


HEAD = '<!DOCTYPE html><html><!-- <meta charset="x-none"> --><head><title>page</title>{}</head><body><main>'


META = '<meta charset="{}">'


HTTP_EQUIV = '<META content="text/html; charset={}" Http-Equiv=Content-Type>'


XML = '<?xml version="1.0" encoding="{}"?>'


def encoded(text: str, codec: str) -> bytes:
    if codec != "cp1258":
        return text.encode(codec)
    marks = "\u0300\u0301\u0303\u0309\u0323"  # in cp1258, tone marks are separate characters
    letters = []
    for letter in unicodedata.normalize("NFC", text):
        parts = unicodedata.normalize("NFD", letter)
        base = unicodedata.normalize("NFC", "".join(part for part in parts if part not in marks))
        letters.append(base + "".join(part for part in parts if part in marks))
    return "".join(letters).encode("cp1258")
