"""Word lists that the task generators draw from."""

from __future__ import annotations


def words_of(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = words_of("""
    otter falcon maple river stone lantern harbor meadow pepper violin candle bridge tiger rabbit window garden basket
    pencil mirror blanket hammer ladder bottle kettle saddle anchor compass feather blossom thunder glacier canyon
    desert island forest valley mountain ocean planet comet rocket engine wheel carpet curtain pillow cushion drawer
    table chair bench shelf closet ceiling floor chimney tower castle palace temple market village city street corner
    tunnel station airport museum library school college office factory workshop kitchen cellar attic balcony fountain
    statue painting poem novel letter journal diary map atlas globe clock watch calendar ticket passport wallet purse
    jacket sweater scarf glove boot sandal hat crown ring necklace bracelet button needle thread ribbon rope chain
    hook nail screw wrench shovel rake bucket barrel crate box jar bowl plate spoon fork knife napkin apron oven stove
    toast butter cheese honey sugar salt lemon orange apple banana cherry grape melon peach plum pear mango olive
    tomato potato carrot onion garlic cabbage lettuce spinach bean pea corn rice wheat barley oat bread cake cookie
    pie soup salad sandwich noodle dumpling coffee tea juice milk water wine horse donkey sheep goat cow pig dog cat
    mouse squirrel beaver badger fox wolf bear deer moose eagle owl robin sparrow raven crow swan goose duck turtle
    lizard snake frog salmon trout whale dolphin shark crab lobster spider beetle butterfly
    """)

ADJECTIVES = words_of("""
    brave quiet silver golden crimson gentle clever eager lucky mighty noble proud rapid silent tiny vivid wise young
    ancient bitter bold bright calm cold cool dark deep dry early fancy fair fast fierce fine firm flat fresh funny
    grand great green happy hard heavy high hollow honest hot humble icy jolly keen kind large late lazy light little
    lively long loud loyal merry mild modern narrow neat new nice odd old pale plain polite pretty pure purple quick
    rare red rich ripe rough round royal rusty sad salty sharp shiny short shy simple sleepy slim slow small smart
    smooth soft solid sour spicy steady steep stiff strange strong sunny sweet swift tall tame tart tender thick thin
    tidy tired tough warm weak wet white wide wild windy yellow amber azure blue brown coral gray ivory jade orange
    pink scarlet teal violet
    """)

COLORS = words_of("red blue green yellow black white purple orange pink brown gray teal")

FIRST_NAMES = words_of("""
    Anna Ben Clara David Elena Felix Grace Hugo Irene James Karen Liam Maria Nora Oscar Paula Quentin Rosa Samuel Tara
    Ursula Victor Wendy Xavier Yara Zoe Alice Bruno Carmen Diego Emma Frank Gloria Henry Isabel Jonas Kate Laura Martin
    Nina Oliver Petra Robert Sofia Thomas Vera William Amina Boris Chen Dana Erik Fatima George Hannah Ivan Julia Kenji
    Lucas Mia Noah Olga Pedro Rita Simon Tina Walter Lena Marco Yuki Omar Priya Raj Sven
    """)

LAST_NAMES = words_of("""
    Adams Baker Carter Davis Evans Fisher Garcia Harris Ito Jensen Keller Lopez Miller Novak Olsen Parker Quinn Rossi
    Smith Turner Ueda Vargas Walker Young Zimmer Allen Brown Clark Dubois Ellis Foster Green Hughes Ivanov Jones King
    Lewis Moore Nelson Owens Peters Reed Scott Taylor Underwood Vogel White Khan Silva Tanaka Muller Schmidt Weber
    Santos Costa Lee Kim Park Nguyen Patel Singh Cohen Murphy Hansen Berg Moreau Lambert Ferrari Bianchi Kowalski
    """)

CITIES = words_of("""
    Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Stockholm Helsinki Copenhagen Warsaw Prague Budapest
    Athens Amsterdam Brussels Zurich Geneva Munich Hamburg Milan Naples Barcelona Porto Lyon Marseille Tokyo Osaka
    Kyoto Seoul Beijing Shanghai Delhi Mumbai Bangkok Hanoi Jakarta Manila Singapore Sydney Melbourne Auckland Cairo
    Nairobi Lagos Casablanca Tunis Boston Chicago Denver Seattle Dallas Houston Miami Atlanta Toronto Montreal
    Vancouver Lima Bogota Santiago Quito Havana Moscow Kiev Riga Tallinn Istanbul Ankara Dubai Tehran Karachi Lahore
    Dhaka Portland Phoenix
    """)

JOBS = words_of("""
    teacher nurse lawyer baker pilot farmer painter writer doctor engineer plumber chef singer dentist driver gardener
    librarian mechanic carpenter tailor architect chemist actor banker barber butcher clerk dancer editor florist
    geologist journalist judge musician optician photographer physicist sailor sculptor surgeon waiter
    """)

MONTHS = words_of("January February March April May June July August September October November December")

DAYS = words_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

VERBS = words_of("""
    add archive assign book cancel check close compare convert copy create delete download export fetch find get import
    list lock log move open order pause play print publish read record remove rename reserve reset resize restart save
    schedule search send set share show start stop submit sync track translate unlock update upload verify
    """)

OBJECTS = words_of("""
    account address alarm album appointment article backup bill booking bug calendar camera card chart comment contact
    contract course device document door email event expense file flight folder form game image invoice issue item job
    lamp lesson meeting member menu message movie note order package parcel payment photo playlist podcast post printer
    product profile project query recipe refund reminder report review room route sale server session shipment song
    sensor story student survey table task team ticket timer trip user vehicle video visit
    """)
