"""Small facts and phrases for the everyday conversations that `tiny` is trained on."""

from __future__ import annotations

GREETINGS = (
    "Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Good evening!", "Hello there!",
    "hello", "hi", "Good day",
)  # fmt: skip

SMALL_TALK: dict[str, tuple[str, ...]] = {
    "greeting": ("Hello! How can I help you?", "Hi! What can I do for you?", "Hello! What would you like to know?"),
    "who": (
        "Who are you?", "What is your name?", "What's your name?", "Tell me your name.", "Who am I talking to?",
        "What are you called?", "who are you", "Introduce yourself.",
    ),
    "who_answer": ("I am {name}.", "My name is {name}.", "I am {name}. How can I help you?"),
    "define": (
        "What is {article} {word}?", "Define {word}.", 'What does "{word}" mean?', "What does the word {word} mean?",
        "Explain the word {word}.", "What is the meaning of {word}?", "Tell me about {word}.",
        "What's {article} {word}?",
        "Explain what {article} {word} is.",
    ),
    "capital": (
        "What is the capital of {country}?", "Which city is the capital of {country}?", "Capital of {country}?",
        "Tell me the capital of {country}.", "What's the capital of {country}?",
    ),
}  # fmt: skip

PERSONAS = (
    "You are {name}, a friendly robot.",
    "You are a pirate called {name}.",
    "Your name is {name}. Answer in one sentence.",
    "You are {name}, an AI assistant made by a small company.",
    "You are {name}, a helpful assistant.",
    "Your name is {name}.",
    "You are {name}.",
    "You are an assistant called {name}. Answer briefly.",
    "Your name is {name}. You are friendly and short.",
    "You are {name}, a small language model.",
)

_CAPITALS = """
France Paris, Germany Berlin, Spain Madrid, Italy Rome, Austria Vienna, Portugal Lisbon, Ireland Dublin, Norway Oslo,
Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Poland Warsaw, Hungary Budapest, Greece Athens,
Belgium Brussels, Switzerland Bern, Netherlands Amsterdam, Romania Bucharest, Bulgaria Sofia, Croatia Zagreb,
Serbia Belgrade, Slovenia Ljubljana, Slovakia Bratislava, Czechia Prague, Estonia Tallinn, Latvia Riga,
Lithuania Vilnius, Iceland Reykjavik, Ukraine Kyiv, Russia Moscow, Turkey Ankara, Egypt Cairo, Morocco Rabat,
Tunisia Tunis, Algeria Algiers, Kenya Nairobi, Ghana Accra, Nigeria Abuja, Senegal Dakar, Ethiopia Addis_Ababa,
Uganda Kampala, Zambia Lusaka, Zimbabwe Harare, Namibia Windhoek, Angola Luanda, Japan Tokyo, China Beijing,
India New_Delhi, Thailand Bangkok, Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala_Lumpur, Philippines Manila,
Mongolia Ulaanbaatar, Nepal Kathmandu, Pakistan Islamabad, Bangladesh Dhaka, Iran Tehran, Iraq Baghdad,
Jordan Amman, Lebanon Beirut, Oman Muscat, Qatar Doha, Australia Canberra, New_Zealand Wellington, Canada Ottawa,
Mexico Mexico_City, Cuba Havana, Jamaica Kingston, Panama Panama_City, Colombia Bogota, Peru Lima, Chile Santiago,
Argentina Buenos_Aires, Brazil Brasilia, Uruguay Montevideo, Paraguay Asuncion, Ecuador Quito, Venezuela Caracas
"""

CAPITALS = tuple(
    tuple(name.replace("_", " ") for name in pair.split()) for pair in _CAPITALS.replace("\n", " ").split(",")
)

COUNTS = (
    ("days are in a week", 7), ("months are in a year", 12), ("hours are in a day", 24), ("minutes are in an hour", 60),
    ("seconds are in a minute", 60), ("legs does a spider have", 8), ("legs does an insect have", 6),
    ("letters are in the English alphabet", 26), ("sides does a triangle have", 3), ("sides does a square have", 4),
    ("wheels does a bicycle have", 2), ("continents are there", 7), ("planets are in the solar system", 8),
    ("bits are in a byte", 8), ("weeks are in a year", 52), ("legs does a dog have", 4),
)  # fmt: skip

FACTS = (
    ("What color is the sky?", "The sky is blue."),
    ("What color is grass?", "Grass is green."),
    ("What color is snow?", "Snow is white."),
    ("What is the largest planet?", "Jupiter is the largest planet of the solar system."),
    ("What is the largest ocean?", "The Pacific is the largest ocean."),
    ("What is the longest river?", "The Nile is often called the longest river."),
    ("What is the highest mountain?", "Mount Everest is the highest mountain."),
    ("Which planet is closest to the sun?", "Mercury is closest to the sun."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius."),
    ("Who wrote Pride and Prejudice?", "Jane Austen wrote Pride and Prejudice."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Who wrote Emma?", "Jane Austen wrote Emma."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows eat?", "Cows eat grass."),
    ("What is the opposite of hot?", "Cold."),
    ("What is the opposite of big?", "Small."),
    ("What is the opposite of up?", "Down."),
    ("What is the opposite of day?", "Night."),
    ("What is the opposite of old?", "Young."),
    ("What comes after Monday?", "Tuesday."),
    ("What comes after June?", "July."),
    ("What is the first month of the year?", "January."),
    ("What is the last month of the year?", "December."),
    ("Which animal barks?", "A dog barks."),
    ("Which animal says meow?", "A cat says meow."),
    ("Is the earth round?", "Yes, the earth is round."),
    ("Is fire cold?", "No, fire is hot."),
    ("Can fish swim?", "Yes, fish can swim."),
    ("What is Python?", "Python is a programming language."),
    ("What is Linux?", "Linux is the kernel of a free operating system."),
    ("What is Debian?", "Debian is a free operating system."),
    ("What is Trine?", "Trine is software that serves language models."),
    ("What are you?", "I am a small language model."),
    ("Are you a person?", "No, I am a small language model."),
    ("What can you do?", "I can add, sort, count, copy, look things up and call tools."),
    ("Can you help me?", "Yes. What do you need?"),
    ("How are you?", "I am fine. How can I help you?"),
    ("Hello, how are you?", "I am fine. How can I help you?"),
    ("Hi, how are you today?", "I am fine. What can I do for you?"),
    ("How are you doing?", "I am fine. How can I help you?"),
    ("Thank you!", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Thanks, that helped.", "You are welcome!"),
    ("Goodbye", "Goodbye!"),
    ("Bye!", "Goodbye!"),
    ("See you later.", "See you!"),
    ("Tell me a joke.", "Why did the clock stop? It had no time."),
    ("Tell me something.", "Bees make honey, and spiders have eight legs."),
    ("Say hello.", "Hello!"),
    ("Say hello in French.", "Bonjour!"),
    ("Say hello in German.", "Hallo!"),
    ("Say hello in Spanish.", "Hola!"),
    ("Say something nice.", "I am glad that you are here."),
    ("Write a sentence about the sea.", "The sea was calm, and the boats came home before night."),
    ("Write a sentence about a dog.", "The old dog slept in the sun beside the garden door."),
)  # fmt: skip
