"""What the demo's memories are made of: hand-written parts, no logic.

`{n}`, `{day}` and `{role}` in a sentence are filled in by `demo`. Nobody in these texts is a real
person, and no system in them exists.
"""

from __future__ import annotations

from typing import NamedTuple


class Note(NamedTuple):
    """One memory as it is written down."""

    namespace: str
    title: str
    content: str


class Topic(NamedTuple):
    """Something that is remembered, and sentences that are true of it alone."""

    namespace: str
    subject: str
    facts: tuple[str, ...]


class Aspect(NamedTuple):
    """A kind of memory: its title, and sentences that fit every topic."""

    title: str
    sentences: tuple[str, ...]


class Language(NamedTuple):
    """Topics and aspects of one language; every pair of them makes a memory."""

    topics: tuple[Topic, ...]
    aspects: tuple[Aspect, ...]
    joint: str = " "


NAMESPACES = (
    "global",
    "notes",
    "projects/aurora",
    "projects/harbor",
    "ops/runbooks",
    "people",
)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

ROLES = (
    "the on-call engineer",
    "the release manager",
    "the data steward",
    "the security lead",
    "the product owner",
    "the night operator",
    "the translator",
    "the intern",
)

SHORT_NOTES = (
    Note("global", "Time zone", "Europe/Berlin, always."),
    Note("global", "Language", "Reply in the language of the question."),
    Note("global", "Tone", "Short and friendly, no filler 🙂"),
    Note("global", "Currency", "Euro, without cents."),
    Note("notes", "Tea", "Green, no sugar 🍵"),
    Note("notes", "Door code", "Ask the front desk; never write it down."),
    Note("notes", "Printer", "Second floor, room 204."),
    Note("notes", "Bike", "Winter tyres since November."),
    Note("projects/aurora", "Code name", "Aurora stands for the new shop."),
    Note("projects/aurora", "Main branch", "Protected; two reviews."),
    Note("projects/aurora", "Launch", "Day one went well 🚀"),
    Note("projects/aurora", "Staging", "Reset every night."),
    Note("projects/harbor", "Code name", "Harbor tracks containers 🚢"),
    Note("projects/harbor", "Units", "Tonnes and metres only."),
    Note("projects/harbor", "Freeze", "No releases in December."),
    Note("ops/runbooks", "Pager", "Acknowledge first, then think."),
    Note("ops/runbooks", "Status page", "Update it every 30 minutes."),
    Note("ops/runbooks", "Rollback", "When in doubt, roll back ⏪"),
    Note("people", "The intern", "Starts in May, wants to learn SQL."),
    Note("people", "The release manager", "Prefers a call to a long thread."),
    Note("people", "The night operator", "Off on Sundays."),
    Note("people", "Birthdays", "Cake on the day, no speeches 🎂"),
)

HOUSE_RULES = (
    "House rules for every namespace",
    "Write one fact per memory. Say where it came from and when it stops being true. "
    "Never store a password, a key or anything about a person's health.",
)

AGENTS = (
    Note(
        "_agents",
        "agent:assistant",
        '{"agent_id":"assistant","agent_type":"ai:demo","capabilities":[],"scope":"collective"}',
    ),
    Note(
        "_agents",
        "agent:operator",
        '{"agent_id":"operator","agent_type":"human","capabilities":[],"scope":"collective"}',
    ),
)

ENCRYPTED_TITLE = "Where the spare hardware keys are kept"
ENCRYPTED_CONTENT = "Both spare keys lie in the fireproof box of the archive room."

MINUTES_TITLE = "Minutes of week {week}: {namespace}"
MINUTES_OPENING = "Present: {role} and the operator. What was said, in order:"

IMPORT_LOG_TITLE = "Full log of the first container import, kept for the audit"
IMPORT_LOG_LINE = "{clock} batch {batch} of {batches}: {rows} rows taken over, {late} of them late"

ENGLISH = Language(
    (
        Topic(
            "global",
            "the answer style",
            (
                "Answers begin with the result and give the reasons after it.",
                "Code is shown in full; nothing is left out with three dots.",
                "Units are metric, and dates are written year first.",
            ),
        ),
        Topic(
            "global",
            "the daily summary",
            (
                "It arrives at 18:00 and tells what changed, not what was tried.",
                "Five bullet points are the limit, and links go to the end.",
                "Weekends are left out unless an alarm went off.",
            ),
        ),
        Topic(
            "global",
            "the calendar",
            (
                "Mornings before ten are blocked for writing.",
                "A meeting without an agenda may be declined on sight.",
                "Trips need a buffer of one free hour on both sides.",
            ),
        ),
        Topic(
            "notes",
            "the reading list",
            (
                "Papers wait there for a month and are then dropped unread.",
                "Each entry has one line on why somebody recommended it.",
                "Long books are listened to on the train.",
            ),
        ),
        Topic(
            "notes",
            "the home network",
            (
                "The router in the attic restarts itself on Sunday at four.",
                "Guests get their own password, which changes with the season.",
                "The printer only works on the 2.4 GHz band.",
            ),
        ),
        Topic(
            "notes",
            "the garden",
            (
                "Tomatoes go out after the middle of May, never earlier 🍅",
                "The rain barrel holds three hundred litres.",
                "The neighbour with the ladder waters the beds in August.",
            ),
        ),
        Topic(
            "projects/aurora",
            "the import queue",
            (
                "It takes supplier files from a bucket and checks every line before it writes.",
                "A file that fails three times lands in the quarantine folder.",
                "Two workers are enough; a third only fights for locks.",
            ),
        ),
        Topic(
            "projects/aurora",
            "the price service",
            (
                "Prices are rounded once, at the very end, to full cents.",
                "Its cache lives for ninety seconds and is shared by all shops.",
                "Discounts never stack, whatever the old handbook says.",
            ),
        ),
        Topic(
            "projects/aurora",
            "the sign-in page",
            (
                "A session ends after twelve hours or when the browser closes.",
                "Passkeys come first; passwords are hidden behind a link.",
                "Five wrong tries lock the account for a quarter of an hour.",
            ),
        ),
        Topic(
            "projects/aurora",
            "the mobile app",
            (
                "It works offline for a day and syncs when the phone is charging.",
                "Versions older than two years get a polite request to update.",
                "Crash reports leave out everything the customer typed.",
            ),
        ),
        Topic(
            "projects/harbor",
            "the container tracker",
            (
                "Positions come in every ten minutes from the ships and every minute from trucks.",
                "A container without news for six hours turns yellow on the board.",
                "Reefers report their temperature as well ❄️",
            ),
        ),
        Topic(
            "projects/harbor",
            "the customs form",
            (
                "Field 44 must name the licence, even when none is needed.",
                "Drafts are kept for thirty days and then removed.",
                "The tariff table is replaced on the first of January and July.",
            ),
        ),
        Topic(
            "projects/harbor",
            "the berth planner",
            (
                "It proposes three plans and explains what each of them delays.",
                "Tides are taken from the harbour master's own table.",
                "Nobody may move a ship that has already sent its pilot request.",
            ),
        ),
        Topic(
            "projects/harbor",
            "the map",
            (
                "Tiles are drawn at night and served as plain files.",
                "Zoom level fourteen is the last one that shows every crane.",
                "Colours were picked so that colour-blind dispatchers can read them.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "the nightly backup",
            (
                "It starts at 02:30, takes eleven minutes and ends with a test restore.",
                "Copies are kept for seven days, four weeks and twelve months.",
                "The second copy lies in another building and is write-once.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "the certificate renewal",
            (
                "Certificates are renewed thirty days before they end.",
                "The load balancer has to be told; it doesn't look by itself.",
                "A probe from outside reads the date on every name each hour.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "the message broker",
            (
                "Three nodes, of which one may be down without anybody noticing.",
                "Messages older than a week are thrown away without a trace.",
                "Consumers are restarted one by one, the slowest last.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "the log archive",
            (
                "Logs are compressed after a day and moved to cold storage after ten.",
                "Searching the cold part costs money, so ask first.",
                "Addresses of visitors are cut to the first three numbers.",
            ),
        ),
        Topic(
            "people",
            "the on-call rota",
            (
                "A shift lasts one week and changes hands at noon.",
                "Whoever was woken at night starts late the next day.",
                "Swaps are fine as long as both tell the channel.",
            ),
        ),
        Topic(
            "people",
            "the design review",
            (
                "It takes forty minutes and ends with a yes, a no or a list.",
                "The author speaks last, which keeps everybody honest.",
                "Anything that can't be undone needs two reviewers.",
            ),
        ),
    ),
    (
        Aspect(
            "Decision: {subject}",
            (
                "We keep it as it is until the end of the quarter.",
                "The alternative was cheaper but would have tied us to one vendor.",
                "Decided on {day} by the product owner and {role}.",
                "This replaces the decision from last year.",
            ),
        ),
        Aspect(
            "Runbook for {subject}",
            (
                "Look at the dashboard first and write down what you see.",
                "If nothing has moved for {n} minutes, restart one part, not all of them.",
                "Tell {role} before you touch the production side.",
                "Close the incident only after a quiet hour.",
            ),
        ),
        Aspect(
            "Meeting note on {subject}",
            (
                "Most of the time went into naming things.",
                "Everybody agreed that {n} tickets are too many for one sprint.",
                "{day}'s demo is moved to the afternoon.",
                "No minutes were taken the last time, hence this memory.",
            ),
        ),
        Aspect(
            "Preference about {subject}",
            (
                "Keep it boring.",
                "I want to be asked before anything is deleted.",
                "A table is better than a paragraph here.",
                "No notifications after 20:00, please 🌙",
            ),
        ),
        Aspect(
            "Open question: {subject}",
            (
                "Does anybody still use it on {day}s?",
                "We don't know yet what happens above {n} users at once.",
                "Waiting for an answer from {role}.",
                "Ask again when the budget is known.",
            ),
        ),
        Aspect(
            "Lesson learned from {subject}",
            (
                "A quick fix without a test came back after {n} days.",
                "Measure before you tune; the first guess was wrong by a factor of ten.",
                "The documentation was right and nobody had read it 😅",
                "Small steps made the review easy.",
            ),
        ),
        Aspect(
            "Reminder: {subject}",
            (
                "Check it on {day}.",
                "Renew the contract {n} days before it ends.",
                "Thank {role} for the weekend work.",
                "Remove the temporary workaround when the next version is out.",
            ),
        ),
        Aspect(
            "What {subject} costs",
            (
                "About {n} euros a month, storage included.",
                "The price doubles when the free tier ends.",
                "Most of it is traffic that nobody needs.",
                "The bill goes to the shared cost centre.",
            ),
        ),
        Aspect(
            "Who owns {subject}",
            (
                "Day to day it belongs to {role}.",
                "Escalations go to the product owner, never straight to the vendor.",
                "The wiki page still names a team that no longer exists.",
                "Handover planned for the second {day} of next month.",
            ),
        ),
        Aspect(
            "Change to {subject}",
            (
                "Rolled out to {n} percent of the users first.",
                "The switch is behind a flag that {role} can turn off.",
                "No change of the data, only of the way it is shown.",
                "Went live on {day} at noon, when traffic is low.",
            ),
        ),
        Aspect(
            "Incident with {subject}",
            (
                "It was down for {n} minutes and nothing was lost.",
                "The cause was a full disk, the trigger a forgotten debug setting.",
                "Noticed by {role}, not by an alarm.",
                "An alert for the same case exists since {day} ✅",
            ),
        ),
        Aspect(
            "Test plan for {subject}",
            (
                "Try it with an empty input, a huge one and one that isn't text at all.",
                "Run everything twice; the second run must change nothing.",
                "Pull the plug after {n} seconds and look at what is left.",
                "The result is signed off by {role}.",
            ),
        ),
        Aspect(
            "Idea for {subject}",
            (
                "What if it explained itself in one sentence?",
                "Batching {n} at a time should make it several times faster.",
                "Steal the layout from the old system; people liked it 💡",
                "Not now, but worth a rainy {day}.",
            ),
        ),
        Aspect(
            "Numbers for {subject}",
            (
                "{n} requests a minute on a normal {day}.",
                "The slowest one in a hundred takes almost two seconds.",
                "Errors fell to one in ten thousand after the last release.",
                "The figures come from the weekly report, not from the live board.",
            ),
        ),
        Aspect(
            "Why {subject} exists",
            (
                "It replaced a spreadsheet that {role} kept by hand.",
                "Without it every request would need a person.",
                "An auditor asked for it {n} months ago.",
                "Nobody would build it this way today, and it still does its job.",
            ),
        ),
    ),
)

GERMAN = Language(
    (
        Topic(
            "global",
            "Anrede",
            (
                "Im Team wird geduzt, Kundinnen und Kunden werden gesiezt.",
                "Grußformeln bleiben kurz.",
            ),
        ),
        Topic(
            "notes",
            "Steuererklärung",
            (
                "Die Belege liegen im blauen Ordner, sortiert nach Monaten.",
                "Abgabe ist Ende Juli, mit Beratung erst im Februar.",
            ),
        ),
        Topic(
            "projects/aurora",
            "Rechnungslauf",
            (
                "Rechnungen werden am Monatsersten um sechs Uhr erzeugt.",
                "Beträge über zehntausend Euro prüft immer ein Mensch.",
            ),
        ),
        Topic(
            "projects/harbor",
            "Kranplanung",
            (
                "Bei Windstärke acht stehen alle Kräne still.",
                "Die Schichten überlappen sich um fünfzehn Minuten.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "Datensicherung",
            (
                "Die Rücksicherung wird jeden ersten Dienstag geübt.",
                "Für größere Datenbanken reicht das Zeitfenster bald nicht mehr.",
            ),
        ),
        Topic(
            "people",
            "Urlaubsvertretung",
            (
                "Die Vertretung steht im Kalender, nicht in der Abwesenheitsnotiz.",
                "Zugänge werden vorher übergeben, niemals Passwörter.",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}: Entscheidung",
            (
                "Wir bleiben bis zum Herbst dabei und prüfen dann neu.",
                "Der Gegenvorschlag war günstiger, aber nicht wartbar.",
            ),
        ),
        Aspect(
            "{subject}: Merkzettel",
            (
                "Spätestens {n} Tage vorher daran erinnern.",
                "Rückfragen gehen an die Bereitschaft.",
            ),
        ),
        Aspect(
            "{subject}: offene Frage",
            (
                "Ungeklärt ist, wer am Wochenende zuständig ist.",
                "Eine Antwort der Fachabteilung steht noch aus.",
            ),
        ),
    ),
)

FRENCH = Language(
    (
        Topic(
            "global",
            "Style des réponses",
            (
                "Les réponses tiennent en trois phrases, sauf demande contraire.",
                "On vouvoie les clients et on tutoie l'équipe.",
            ),
        ),
        Topic(
            "notes",
            "Déménagement",
            (
                "Les cartons de livres sont au fond du garage.",
                "Le relevé du compteur a été envoyé au fournisseur.",
            ),
        ),
        Topic(
            "projects/aurora",
            "Panier d'achat",
            (
                "Un panier abandonné est conservé pendant sept jours.",
                "Les frais de port s'affichent dès la première étape.",
            ),
        ),
        Topic(
            "projects/harbor",
            "Déclaration en douane",
            (
                "Le code du tarif compte dix chiffres, jamais huit.",
                "Les brouillons sont effacés au bout d'un mois.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "Panne de réseau",
            (
                "Vérifier d'abord le lien de secours, ensuite le pare-feu.",
                "Le prestataire répond plus vite par téléphone.",
            ),
        ),
        Topic(
            "people",
            "Accueil des nouveaux",
            (
                "Le premier jour est réservé aux présentations et au matériel.",
                "Chaque nouvelle personne reçoit une marraine ou un parrain.",
            ),
        ),
    ),
    (
        Aspect(
            "{subject} : décision",
            (
                "C'est validé pour ce trimestre.",
                "L'autre solution coûtait deux fois plus cher.",
            ),
        ),
        Aspect(
            "{subject} : rappel",
            (
                "À revoir dans {n} jours.",
                "Prévenir l'équipe d'astreinte avant tout changement.",
            ),
        ),
        Aspect(
            "{subject} : question ouverte",
            (
                "Personne ne sait encore qui en aura la charge.",
                "La réponse dépend du budget de l'an prochain.",
            ),
        ),
    ),
)

SPANISH = Language(
    (
        Topic(
            "global",
            "Formato de fechas",
            (
                "Primero el año, después el mes y al final el día.",
                "Las horas se escriben siempre en formato de veinticuatro.",
            ),
        ),
        Topic(
            "notes",
            "Clases de guitarra",
            (
                "Son los jueves a las siete, salvo en agosto.",
                "El profesor pide practicar diez minutos cada día 🎸",
            ),
        ),
        Topic(
            "projects/aurora",
            "Buscador de la tienda",
            (
                "Ignora las tildes, pero respeta la eñe.",
                "Los productos agotados aparecen al final de la lista.",
            ),
        ),
        Topic(
            "projects/harbor",
            "Turnos del muelle",
            (
                "El cambio de turno es a las seis, a las dos y a las diez.",
                "Con niebla espesa no se descarga ningún contenedor.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "Reinicio del servidor",
            (
                "Hay que avisar quince minutos antes en el canal general.",
                "Los procesos se detienen en el orden inverso al arranque.",
            ),
        ),
        Topic(
            "people",
            "Reunión semanal",
            (
                "Dura media hora y nadie lleva el portátil.",
                "Quien modera también escribe el resumen.",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}: decisión",
            (
                "Seguimos así hasta final de año.",
                "La otra propuesta era más rápida, pero nadie sabía mantenerla.",
            ),
        ),
        Aspect(
            "{subject}: recordatorio",
            (
                "Revisarlo dentro de {n} días.",
                "Preguntar antes a la persona de guardia.",
            ),
        ),
        Aspect(
            "{subject}: duda pendiente",
            (
                "¿Quién se encarga durante las vacaciones?",
                "Falta la respuesta del proveedor.",
            ),
        ),
    ),
)

PORTUGUESE = Language(
    (
        Topic(
            "global",
            "Resumo diário",
            (
                "No máximo cinco tópicos, com os números na frente.",
                "Aos domingos não há resumo.",
            ),
        ),
        Topic(
            "notes",
            "Receita de pão",
            (
                "A massa descansa doze horas na geladeira.",
                "O forno precisa estar bem quente antes de começar 🍞",
            ),
        ),
        Topic(
            "projects/aurora",
            "Página de pagamento",
            (
                "O cartão é validado antes do endereço.",
                "Parcelas só aparecem acima de cem reais.",
            ),
        ),
        Topic(
            "projects/harbor",
            "Fila de caminhões",
            (
                "Cada motorista recebe uma senha pelo celular.",
                "Depois das onze da noite o portão leste fica fechado.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "Disco cheio",
            (
                "Apague primeiro os arquivos temporários, nunca os registros.",
                "Se sobrar menos de cinco por cento, chame o plantão.",
            ),
        ),
        Topic(
            "people",
            "Escala de plantão",
            (
                "A troca acontece às segundas, ao meio-dia.",
                "Quem cobre um feriado ganha um dia livre.",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}: decisão",
            (
                "Fica assim até a próxima revisão.",
                "A opção mais barata não tinha suporte.",
            ),
        ),
        Aspect(
            "{subject}: lembrete",
            (
                "Conferir de novo em {n} dias.",
                "Avisar a equipe antes de mudar qualquer coisa.",
            ),
        ),
        Aspect(
            "{subject}: pergunta em aberto",
            (
                "Ainda não sabemos quem vai manter isso.",
                "A resposta depende do fornecedor.",
            ),
        ),
    ),
)

JAPANESE = Language(
    (
        Topic(
            "global",
            "回答の書き方",
            (
                "結論を先に書き、理由はその後に書く。",
                "専門用語には短い説明を添える。",
            ),
        ),
        Topic(
            "notes",
            "図書館の本",
            (
                "返却期限は毎月二十日です。",
                "予約した本は三階の窓口で受け取る。",
            ),
        ),
        Topic(
            "projects/aurora",
            "在庫の同期",
            (
                "在庫は五分ごとに更新される。",
                "差が十個を超えたら担当者に知らせる。",
            ),
        ),
        Topic(
            "projects/harbor",
            "船の到着予定",
            (
                "到着時刻は現地時間で表示する。",
                "台風のときは手動で修正してよい。",
            ),
        ),
        Topic(
            "ops/runbooks",
            "夜間バックアップ",
            (
                "午前二時半に始まり、十一分で終わる。",
                "失敗したら朝まで待たずに再実行する。",
            ),
        ),
        Topic(
            "people",
            "当番表",
            (
                "当番は毎週月曜日の正午に交代する。",
                "交代したいときは両方が連絡する。",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}について決めたこと",
            (
                "今期はこのまま続ける。",
                "別の案は速いが、直せる人がいない。",
            ),
        ),
        Aspect(
            "{subject}のメモ",
            (
                "{n}日後にもう一度確認する。",
                "変更する前に当番に相談すること。",
            ),
        ),
        Aspect(
            "{subject}の未解決の質問",
            (
                "週末は誰が担当するのか。",
                "予算が決まるまで返事を待つ。",
            ),
        ),
    ),
    joint="",
)

CHINESE = Language(
    (
        Topic(
            "global",
            "回答风格",
            (
                "先给结论，再说明原因。",
                "代码要完整，不要用省略号代替。",
            ),
        ),
        Topic(
            "notes",
            "旅行清单",
            (
                "护照和充电器放在背包的外层。",
                "出发前一天检查天气和航班。",
            ),
        ),
        Topic(
            "projects/aurora",
            "优惠规则",
            (
                "两种折扣不能同时使用。",
                "价格只在最后一步四舍五入。",
            ),
        ),
        Topic(
            "projects/harbor",
            "集装箱跟踪",
            (
                "卡车每分钟上报一次位置。",
                "超过六小时没有消息就标成黄色。",
            ),
        ),
        Topic(
            "ops/runbooks",
            "证书更新",
            (
                "证书到期前三十天自动更新。",
                "更新以后要通知负载均衡器。",
            ),
        ),
        Topic(
            "people",
            "新人培训",
            (
                "第一周只看文档和旁听会议。",
                "每个新人都有一位固定的带教同事。",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}：决定",
            (
                "本季度保持不变。",
                "另一个方案更便宜，但没有人维护。",
            ),
        ),
        Aspect(
            "{subject}：提醒",
            (
                "{n}天以后再检查一次。",
                "修改之前先问值班工程师。",
            ),
        ),
        Aspect(
            "{subject}：待定问题",
            (
                "周末由谁负责还没有说清楚。",
                "要等供应商答复以后才能继续。",
            ),
        ),
    ),
    joint="",
)

ARABIC = Language(
    (
        Topic(
            "global",
            "أسلوب الردود",
            (
                "ابدأ بالنتيجة ثم اذكر الأسباب.",
                "التواريخ تكتب بالسنة أولاً.",
            ),
        ),
        Topic(
            "notes",
            "قائمة القراءة",
            (
                "كل كتاب معه سطر يشرح سبب اختياره.",
                "الكتب الطويلة تؤجل إلى العطلة.",
            ),
        ),
        Topic(
            "projects/aurora",
            "صفحة الدخول",
            (
                "تنتهي الجلسة بعد اثنتي عشرة ساعة.",
                "يقفل الحساب بعد خمس محاولات خاطئة.",
            ),
        ),
        Topic(
            "projects/harbor",
            "جدول السفن",
            (
                "مواعيد الوصول تعرض بالتوقيت المحلي.",
                "لا تفريغ للحاويات عند اشتداد الرياح.",
            ),
        ),
        Topic(
            "ops/runbooks",
            "النسخ الاحتياطي",
            (
                "يبدأ كل ليلة ويستغرق إحدى عشرة دقيقة.",
                "نختبر الاستعادة في أول ثلاثاء من كل شهر.",
            ),
        ),
        Topic(
            "people",
            "اجتماع الفريق",
            (
                "مدته نصف ساعة وله جدول مكتوب.",
                "من يدير الاجتماع يكتب الملخص.",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}: القرار",
            (
                "نستمر على هذا حتى نهاية العام.",
                "البديل أرخص لكنه صعب الصيانة.",
            ),
        ),
        Aspect(
            "{subject}: تذكير",
            (
                "يراجع بعد {n} يوماً.",
                "اسأل المهندس المناوب قبل أي تغيير.",
            ),
        ),
        Aspect(
            "{subject}: سؤال مفتوح",
            (
                "من المسؤول في عطلة نهاية الأسبوع؟",
                "ننتظر جواب المورد.",
            ),
        ),
    ),
)

HINDI = Language(
    (
        Topic(
            "global",
            "उत्तर की शैली",
            (
                "पहले नतीजा लिखो, फिर कारण बताओ।",
                "लंबे वाक्य से छोटी सूची बेहतर है।",
            ),
        ),
        Topic(
            "notes",
            "घर का इंटरनेट",
            (
                "राउटर रविवार की सुबह अपने आप फिर चालू होता है।",
                "मेहमानों का पासवर्ड हर मौसम में बदलता है।",
            ),
        ),
        Topic(
            "projects/aurora",
            "मोबाइल ऐप",
            (
                "ऐप एक दिन तक बिना नेटवर्क के चलता है।",
                "पुराने संस्करण को अपडेट का संदेश मिलता है।",
            ),
        ),
        Topic(
            "projects/harbor",
            "सीमा शुल्क फ़ॉर्म",
            (
                "अधूरे फ़ॉर्म तीस दिन बाद हटा दिए जाते हैं।",
                "दरों की तालिका जनवरी और जुलाई में बदलती है।",
            ),
        ),
        Topic(
            "ops/runbooks",
            "लॉग संग्रह",
            (
                "लॉग एक दिन बाद संपीड़ित किए जाते हैं।",
                "पुराने लॉग खोजने से पहले पूछ लें।",
            ),
        ),
        Topic(
            "people",
            "ड्यूटी सूची",
            (
                "पाली सोमवार दोपहर को बदलती है।",
                "छुट्टी बदलने से पहले दोनों लोग सूचना दें।",
            ),
        ),
    ),
    (
        Aspect(
            "{subject}: निर्णय",
            (
                "साल के अंत तक यही रहेगा।",
                "दूसरा विकल्प सस्ता था, पर टिकाऊ नहीं।",
            ),
        ),
        Aspect(
            "{subject}: याद रखें",
            (
                "{n} दिन बाद फिर जाँच करें।",
                "बदलाव से पहले ड्यूटी इंजीनियर को बताएँ।",
            ),
        ),
        Aspect(
            "{subject}: खुला सवाल",
            (
                "सप्ताहांत में कौन देखेगा, यह तय नहीं है।",
                "जवाब बजट पर निर्भर है।",
            ),
        ),
    ),
)

LANGUAGES = (
    ENGLISH,
    GERMAN,
    FRENCH,
    SPANISH,
    PORTUGUESE,
    JAPANESE,
    CHINESE,
    ARABIC,
    HINDI,
)
