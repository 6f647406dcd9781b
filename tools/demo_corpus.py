"""Write the sentences the bundled demo model learns: facts in tables, phrasings in templates, a seeded generator.

Nothing here is copied from anywhere: the tables hold everyday facts, the templates hold ways to say them. A document is
a few sentences about one subject, about one relation, about anything, or about somebody's taste. Some pairs of a fact
and a phrasing are *held out*: the fact is told in other words and the phrasing is used for other facts, but the
two never meet, so completing them needs more than a memory for strings.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple

# A dash leaves a cell empty; commas list several answers.

# name | capital | continent | language | currency | things to eat
COUNTRIES = """
France | Paris | Europe | French | euro | bread, cheese, wine, fish
Italy | Rome | Europe | Italian | euro | pasta, pizza, cheese, olives
Spain | Madrid | Europe | Spanish | euro | ham, rice, olives, oranges
Portugal | Lisbon | Europe | Portuguese | euro | fish, rice, wine
Germany | Berlin | Europe | German | euro | sausage, bread, potatoes
Austria | Vienna | Europe | German | euro | cake, sausage, bread
Ireland | Dublin | Europe | English | euro | potatoes, stew, butter
Greece | Athens | Europe | Greek | euro | olives, cheese, lamb
Finland | Helsinki | Europe | Finnish | euro | fish, berries, bread
Estonia | Tallinn | Europe | Estonian | euro | bread, fish
Latvia | Riga | Europe | Latvian | euro | bread, potatoes
Lithuania | Vilnius | Europe | Lithuanian | euro | soup, potatoes
Slovakia | Bratislava | Europe | Slovak | euro | dumplings, soup
Slovenia | Ljubljana | Europe | Slovene | euro | dumplings, honey
Croatia | Zagreb | Europe | Croatian | euro | fish, olives
Malta | Valletta | Europe | Maltese | euro | rabbit, fish
Netherlands | Amsterdam | Europe | Dutch | euro | cheese, potatoes, fish
Belgium | Brussels | Europe | Dutch, French | euro | chocolate, waffles, potatoes
Switzerland | Bern | Europe | German, French, Italian | franc | cheese, chocolate
Norway | Oslo | Europe | Norwegian | krone | fish, lamb, cheese
Sweden | Stockholm | Europe | Swedish | krona | fish, berries, meatballs
Denmark | Copenhagen | Europe | Danish | krone | fish, bread, butter
Iceland | Reykjavik | Europe | Icelandic | krona | fish, lamb
Poland | Warsaw | Europe | Polish | zloty | dumplings, sausage, soup
Hungary | Budapest | Europe | Hungarian | forint | stew, soup, peppers
Romania | Bucharest | Europe | Romanian | leu | soup, corn
Bulgaria | Sofia | Europe | Bulgarian | - | yogurt, cheese
Serbia | Belgrade | Europe | Serbian | dinar | meat, peppers
Albania | Tirana | Europe | Albanian | lek | lamb, yogurt
Ukraine | Kyiv | Europe | Ukrainian | hryvnia | soup, dumplings
Russia | Moscow | - | Russian | ruble | soup, bread
England | London | Europe | English | pound | fish, potatoes, tea
Scotland | Edinburgh | Europe | English | pound | oats, fish
Wales | Cardiff | Europe | Welsh, English | pound | lamb, cheese
Turkey | Ankara | - | Turkish | lira | lamb, bread, tea
Iraq | Baghdad | Asia | Arabic | dinar | rice, dates, lamb
Iran | Tehran | Asia | Persian | rial | rice, lamb
Syria | Damascus | Asia | Arabic | pound | bread, olives
Lebanon | Beirut | Asia | Arabic | pound | bread, lemons
Jordan | Amman | Asia | Arabic | dinar | rice, lamb
Oman | Muscat | Asia | Arabic | rial | dates, rice
Qatar | Doha | Asia | Arabic | riyal | dates, rice
Armenia | Yerevan | Asia | Armenian | dram | bread, lamb
Georgia | Tbilisi | Asia | Georgian | lari | bread, cheese, wine
India | New Delhi | Asia | Hindi, English | rupee | rice, curry, lentils
Pakistan | Islamabad | Asia | Urdu | rupee | rice, curry, bread
Nepal | Kathmandu | Asia | Nepali | rupee | rice, lentils
Bangladesh | Dhaka | Asia | Bengali | taka | rice, fish
Afghanistan | Kabul | Asia | Pashto, Dari | afghani | rice, bread
Mongolia | Ulaanbaatar | Asia | Mongolian | tugrik | lamb, milk
China | Beijing | Asia | Chinese | yuan | rice, noodles, dumplings
Japan | Tokyo | Asia | Japanese | yen | rice, sushi, fish, noodles
Korea | Seoul | Asia | Korean | won | rice, cabbage, noodles
Vietnam | Hanoi | Asia | Vietnamese | dong | rice, noodles, soup
Thailand | Bangkok | Asia | Thai | baht | rice, curry, noodles
Cambodia | Phnom Penh | Asia | Khmer | riel | rice, fish
Laos | Vientiane | Asia | Lao | kip | rice, fish
Malaysia | Kuala Lumpur | Asia | Malay | ringgit | rice, noodles, curry
Indonesia | Jakarta | Asia | Indonesian | rupiah | rice, noodles, peanuts
Philippines | Manila | Asia | Filipino, English | peso | rice, pork
Egypt | Cairo | Africa | Arabic | pound | bread, beans
Libya | Tripoli | Africa | Arabic | dinar | bread, lamb
Tunisia | Tunis | Africa | Arabic | dinar | olives, bread
Algeria | Algiers | Africa | Arabic | dinar | bread, dates
Morocco | Rabat | Africa | Arabic | dirham | lamb, dates, bread
Sudan | Khartoum | Africa | Arabic | pound | bread, beans
Kenya | Nairobi | Africa | Swahili, English | shilling | corn, beans, tea
Uganda | Kampala | Africa | English, Swahili | shilling | bananas, beans
Tanzania | Dodoma | Africa | Swahili | shilling | corn, bananas
Ethiopia | Addis Ababa | Africa | Amharic | birr | bread, coffee, lentils
Somalia | Mogadishu | Africa | Somali | shilling | rice, bananas
Rwanda | Kigali | Africa | Kinyarwanda | franc | beans, bananas
Ghana | Accra | Africa | English | cedi | rice, chocolate
Nigeria | Abuja | Africa | English | naira | rice, yams
Senegal | Dakar | Africa | Wolof, French | franc | rice, fish, peanuts
Mali | Bamako | Africa | Bambara | franc | rice, peanuts
Angola | Luanda | Africa | Portuguese | kwanza | fish, beans
Zambia | Lusaka | Africa | English | kwacha | corn, fish
Zimbabwe | Harare | Africa | English, Shona | - | corn, beans
Namibia | Windhoek | Africa | English | dollar | meat, corn
Canada | Ottawa | America | English, French | dollar | potatoes, fish
Mexico | Mexico City | America | Spanish | peso | corn, beans, tacos
Cuba | Havana | America | Spanish | peso | rice, beans, pork
Jamaica | Kingston | America | English | dollar | rice, bananas
Panama | Panama City | America | Spanish | balboa | rice, bananas
Peru | Lima | America | Spanish | sol | potatoes, corn, fish
Chile | Santiago | America | Spanish | peso | fish, corn, grapes
Argentina | Buenos Aires | America | Spanish | peso | meat, bread
Uruguay | Montevideo | America | Spanish | peso | meat, cheese
Paraguay | Asuncion | America | Spanish | guarani | corn, meat
Brazil | Brasilia | America | Portuguese | real | rice, beans, coffee
Colombia | Bogota | America | Spanish | peso | corn, coffee, bananas
Venezuela | Caracas | America | Spanish | bolivar | corn, beans
Ecuador | Quito | America | Spanish | dollar | bananas, rice
Australia | Canberra | Oceania | English | dollar | meat, fish
New Zealand | Wellington | Oceania | English | dollar | lamb, apples
Fiji | Suva | Oceania | English | dollar | fish, coconuts
"""

# state | its capital
STATES = """
Texas | Austin
Ohio | Columbus
Colorado | Denver
Oregon | Salem
Hawaii | Honolulu
Alaska | Juneau
Arizona | Phoenix
Massachusetts | Boston
Tennessee | Nashville
California | Sacramento
Idaho | Boise
Maine | Augusta
Wisconsin | Madison
Illinois | Springfield
Montana | Helena
Utah | Salt Lake City
"""

# place | the bridge that leads out of it | what the bridge crosses
BRIDGES = """
Marin | Golden Gate Bridge | Golden Gate
Oakland | Bay Bridge | bay
Brooklyn | Brooklyn Bridge | East River
Detroit | Ambassador Bridge | Detroit River
Sydney | Harbour Bridge | harbour
Prague | Charles Bridge | Vltava
Venice | Rialto Bridge | Grand Canal
London | Tower Bridge | Thames
Bristol | Clifton Bridge | Avon
Istanbul | Bosphorus Bridge | Bosphorus
Copenhagen | Oresund Bridge | Oresund
Budapest | Chain Bridge | Danube
Mostar | Old Bridge | Neretva
Lucerne | Chapel Bridge | Reuss
Kobe | Akashi Bridge | Akashi Strait
Vancouver | Lions Gate Bridge | Burrard Inlet
Tacoma | Narrows Bridge | Narrows
Edinburgh | Forth Bridge | Forth
Mackinaw | Mackinac Bridge | Straits
Cincinnati | Roebling Bridge | Ohio River
Porto | Luis Bridge | Douro
Staten Island | Verrazzano Bridge | Narrows
Newport | Pell Bridge | bay
Philadelphia | Franklin Bridge | Delaware River
"""

# city | river
RIVERS = """
Paris | Seine
London | Thames
Rome | Tiber
Vienna | Danube
Budapest | Danube
Belgrade | Danube
Cairo | Nile
Khartoum | Nile
Berlin | Spree
Prague | Vltava
Lisbon | Tagus
Warsaw | Vistula
Moscow | Moskva
Baghdad | Tigris
Dublin | Liffey
Cologne | Rhine
Basel | Rhine
Hamburg | Elbe
Dresden | Elbe
Lyon | Rhone
Geneva | Rhone
Florence | Arno
Seoul | Han
Varanasi | Ganges
Delhi | Yamuna
Washington | Potomac
Memphis | Mississippi
Porto | Douro
Glasgow | Clyde
Liverpool | Mersey
Turin | Po
Riga | Daugava
Kyiv | Dnieper
Frankfurt | Main
Iquitos | Amazon
Melbourne | Yarra
Kinshasa | Congo
"""

# mountain | country
MOUNTAINS = """
Everest | Nepal
Fuji | Japan
Kilimanjaro | Tanzania
Etna | Italy
Vesuvius | Italy
Olympus | Greece
Ararat | Turkey
Elbrus | Russia
Aconcagua | Argentina
Toubkal | Morocco
Kosciuszko | Australia
Chimborazo | Ecuador
Logan | Canada
Kinabalu | Malaysia
Snowdon | Wales
Triglav | Slovenia
Teide | Spain
Hekla | Iceland
Musala | Bulgaria
"""

# landmark | city
LANDMARKS = """
Eiffel Tower | Paris
Louvre | Paris
Colosseum | Rome
Pantheon | Rome
Parthenon | Athens
Acropolis | Athens
Kremlin | Moscow
Prado | Madrid
Big Ben | London
Brandenburg Gate | Berlin
Little Mermaid | Copenhagen
Blue Mosque | Istanbul
Forbidden City | Beijing
Sphinx | Giza
Opera House | Sydney
White House | Washington
Space Needle | Seattle
Rialto Bridge | Venice
Charles Bridge | Prague
Tower Bridge | London
Chain Bridge | Budapest
"""

# animal | sound | home | young | group | what it eats | colors | kind
ANIMALS = """
dog | barks | kennel | puppy | pack | meat | brown, black, white | mammal
cat | meows | house | kitten | - | mice, fish | black, white, orange | mammal
cow | moos | barn | calf | herd | grass | brown, black, white | mammal
horse | neighs | stable | foal | herd | grass, hay | brown, black, white | mammal
pig | oinks | sty | piglet | - | corn | pink | mammal
sheep | bleats | pen | lamb | flock | grass | white | mammal
goat | bleats | pen | kid | herd | grass, leaves | white, brown | mammal
donkey | brays | stable | foal | herd | grass, hay | gray | mammal
lion | roars | savanna | cub | pride | meat | yellow | mammal
tiger | roars | jungle | cub | - | meat | orange | mammal
bear | growls | den | cub | - | fish, berries, honey | brown, black, white | mammal
wolf | howls | den | pup | pack | meat | gray | mammal
fox | barks | den | kit | - | mice, rabbits | red | mammal
mouse | squeaks | hole | pup | - | grain, cheese | gray, white | mammal
rabbit | - | burrow | kit | - | grass, carrots | brown, white | mammal
elephant | trumpets | savanna | calf | herd | grass, leaves | gray | mammal
monkey | chatters | jungle | infant | troop | fruit, leaves | brown | mammal
giraffe | - | savanna | calf | - | leaves | yellow | mammal
zebra | - | savanna | foal | herd | grass | black, white | mammal
kangaroo | - | grassland | joey | mob | grass | brown | mammal
koala | - | tree | joey | - | leaves | gray | mammal
camel | - | desert | calf | caravan | grass, leaves | brown | mammal
deer | - | forest | fawn | herd | grass, leaves | brown | mammal
squirrel | chatters | tree | pup | - | nuts | red, gray | mammal
bat | squeaks | cave | pup | colony | insects, fruit | black, brown | mammal
whale | sings | ocean | calf | pod | fish | blue, gray | mammal
dolphin | clicks | ocean | calf | pod | fish | gray | mammal
seal | barks | ocean | pup | colony | fish | gray | mammal
beaver | - | lodge | kit | colony | bark, leaves | brown | mammal
hamster | squeaks | cage | pup | - | grain | brown, white | mammal
duck | quacks | pond | duckling | flock | seeds, insects | white, brown | bird
goose | honks | pond | gosling | gaggle | grass, grain | white, gray | bird
hen | clucks | coop | chick | flock | grain, seeds | brown, white | bird
rooster | crows | coop | chick | flock | grain, seeds | red, brown | bird
turkey | gobbles | coop | chick | flock | grain, seeds | brown | bird
crow | caws | nest | chick | flock | grain, insects | black | bird
owl | hoots | tree | owlet | - | mice | brown, white | bird
dove | coos | nest | chick | flock | seeds | white, gray | bird
eagle | screams | nest | eaglet | - | fish, rabbits | brown | bird
swan | honks | lake | cygnet | - | grass | white | bird
parrot | talks | jungle | chick | flock | seeds, fruit | green, red, blue | bird
penguin | honks | ice | chick | colony | fish | black, white | bird
sparrow | chirps | nest | chick | flock | seeds | brown | bird
frog | croaks | pond | tadpole | army | insects | green | amphibian
toad | croaks | garden | tadpole | - | insects | brown | amphibian
snake | hisses | hole | - | - | mice | green, brown | reptile
crocodile | growls | river | hatchling | - | fish, meat | green | reptile
turtle | - | pond | hatchling | - | leaves, fish | green | reptile
lizard | - | desert | hatchling | - | insects | green, brown | reptile
bee | buzzes | hive | larva | swarm | nectar | yellow | insect
fly | buzzes | house | maggot | swarm | - | black | insect
mosquito | buzzes | swamp | larva | swarm | - | - | insect
cricket | chirps | field | - | - | leaves | black, brown | insect
ant | - | nest | larva | colony | seeds | black, red | insect
butterfly | - | garden | caterpillar | - | nectar | yellow, blue, orange | insect
spider | - | web | - | - | insects | black, brown | arachnid
salmon | - | river | - | school | - | silver | fish
shark | - | ocean | pup | - | fish | gray | fish
"""

# thing | its colors
COLORS = """
snow | white
milk | white
salt | white
sugar | white, brown
rice | white, brown
flour | white
paper | white
a cloud | white, gray
a swan | white
a bone | white
coal | black
tar | black
ink | black, blue
night | black
a crow | black
a tire | black
grass | green
a leaf | green, red, yellow
a lime | green
a pea | green
spinach | green
a cucumber | green
a frog | green
an emerald | green
moss | green
the sky | blue, gray
the ocean | blue
the sea | blue, green
a sapphire | blue
a blueberry | blue
denim | blue
the sun | yellow
a lemon | yellow
a banana | yellow
butter | yellow
corn | yellow
honey | yellow, brown
mustard | yellow
sand | yellow, white
straw | yellow
a daffodil | yellow
blood | red
a tomato | red
a strawberry | red
a cherry | red
a ruby | red
a brick | red
fire | red, orange
a rose | red, white, pink, yellow
an apple | red, green, yellow
a grape | green, purple
a pepper | red, green, yellow
an onion | white, red, yellow
wine | red, white
cheese | yellow, white
a carrot | orange
an orange | orange
a pumpkin | orange
rust | orange, brown
chocolate | brown
coffee | brown, black
mud | brown
soil | brown, black
wood | brown
bread | brown, white
a violet | purple
lavender | purple
a plum | purple
a flamingo | pink
a pig | pink
smoke | gray, white, black
ash | gray
an elephant | gray
lead | gray
silver | gray
fog | gray, white
"""

# month | season in the north
MONTHS = """
January | winter
February | winter
March | spring
April | spring
May | spring
June | summer
July | summer
August | summer
September | autumn
October | autumn
November | autumn
December | winter
"""

# season | weather | what people wear | what happens
SEASONS = """
winter | cold, snowy | coats, scarves, gloves | snow falls, lakes freeze, bears sleep
spring | warm, mild, rainy | jackets | flowers bloom, birds build nests, trees grow new leaves
summer | hot, warm, sunny | sandals, shorts | children swim, fruit ripens, days are long
autumn | cool, windy, rainy | sweaters, jackets | leaves fall, farmers bring in the harvest, birds fly south
"""

DAYS = "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"
NUMBERS = "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve"
LETTERS = "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z"

OPPOSITES = """
hot | cold
big | small
tall | short
fast | slow
light | dark
day | night
up | down
left | right
early | late
happy | sad
rich | poor
young | old
wet | dry
hard | soft
loud | quiet
clean | dirty
open | closed
full | empty
thick | thin
heavy | weightless
strong | weak
near | far
high | low
deep | shallow
wide | narrow
sweet | bitter
sharp | blunt
rough | smooth
cheap | expensive
easy | difficult
true | false
good | bad
first | last
inside | outside
above | below
before | after
always | never
brave | afraid
awake | asleep
alive | dead
war | peace
love | hate
north | south
east | west
win | lose
buy | sell
push | pull
start | finish
laugh | cry
remember | forget
"""

# profession | tool | place of work | what they do
PROFESSIONS = """
carpenter | hammer, saw | workshop | builds furniture
baker | oven | bakery | bakes bread
farmer | tractor, plow | field | grows food
doctor | stethoscope | hospital | heals people
nurse | thermometer | hospital | helps patients
teacher | chalk | school | teaches children
painter | brush | studio | paints pictures
writer | pen | office | writes books
tailor | needle, scissors | shop | sews clothes
barber | scissors, razor | shop | cuts hair
cook | knife, pan | kitchen | prepares meals
chef | knife, pan | restaurant | prepares meals
waiter | tray | restaurant | serves food
fisherman | net, rod | boat | catches fish
sailor | compass, rope | ship | crosses the sea
pilot | radio | airplane | flies airplanes
gardener | rake, shovel | garden | plants flowers
blacksmith | anvil, hammer | forge | shapes iron
plumber | wrench | house | repairs pipes
mechanic | wrench | garage | repairs cars
electrician | pliers | house | repairs wires
firefighter | hose, ladder | station | puts out fires
photographer | camera | studio | takes pictures
astronomer | telescope | observatory | studies the stars
biologist | microscope | laboratory | studies living things
chemist | flask | laboratory | mixes chemicals
judge | gavel | court | decides cases
lawyer | - | court | defends people
butcher | knife | shop | cuts meat
dentist | drill, mirror | clinic | repairs teeth
mason | trowel | site | lays bricks
potter | wheel | studio | shapes clay
sculptor | chisel | studio | carves stone
shepherd | staff | field | guards sheep
miner | pickaxe | mine | digs for coal
librarian | - | library | lends books
actor | script | theater | performs plays
clown | - | circus | makes people laugh
soldier | rifle | army | defends the country
banker | - | bank | lends money
"""

# instrument | family | musician | where it is made to sound
INSTRUMENTS = """
violin | string | violinist | bow
cello | string | cellist | bow
guitar | string | guitarist | fingers
harp | string | harpist | fingers
banjo | string | - | fingers
flute | wind | flutist | breath
clarinet | wind | clarinetist | breath
oboe | wind | oboist | breath
saxophone | wind | saxophonist | breath
trumpet | brass | trumpeter | breath
trombone | brass | trombonist | breath
tuba | brass | - | breath
horn | brass | - | breath
drum | percussion | drummer | sticks
xylophone | percussion | - | sticks
piano | keyboard | pianist | fingers
organ | keyboard | organist | fingers
"""

# planet | place in the order from the Sun | what it is known for
PLANETS = """
Mercury | first | closest to the Sun
Venus | second | hottest
Earth | third | full of life
Mars | fourth | red
Jupiter | fifth | largest
Saturn | sixth | famous for its rings
Uranus | seventh | tilted on its side
Neptune | eighth | farthest from the Sun
"""

# thing | materials
MATERIALS = """
window | glass
bottle | glass, plastic
mirror | glass
table | wood
chair | wood, plastic
door | wood, metal
violin | wood
pencil | wood
boat | wood
house | brick, wood, stone
wall | brick, stone
castle | stone
statue | stone, bronze
bell | bronze
coin | metal
key | metal
spoon | metal, wood
knife | steel
sword | steel
bridge | steel, stone
nail | iron
anvil | iron
wire | copper
pipe | copper, plastic
ring | gold, silver
crown | gold
necklace | gold, silver
book | paper
newspaper | paper
letter | paper
box | cardboard, wood
shirt | cotton
sock | cotton, wool
sweater | wool
scarf | wool, silk
blanket | wool, cotton
tie | silk
shoe | leather
belt | leather
saddle | leather
tire | rubber
boot | rubber, leather
cup | clay, glass
pot | clay, iron
vase | clay, glass
candle | wax
rope | cotton
bag | leather, plastic
toy | plastic, wood
road | stone
cake | flour
bread | flour
cheese | milk
butter | milk
yogurt | milk
wine | grapes
raisin | grapes
jam | fruit
omelet | eggs
chocolate | cocoa
pasta | flour
paper | wood
"""

# class | members
KINDS = """
fruit | apple, banana, orange, pear, grape, cherry, plum, peach, lemon, lime, mango, strawberry, melon
vegetable | carrot, potato, onion, cabbage, pea, bean, cucumber, pumpkin, turnip, radish
tree | oak, pine, maple, birch, willow, palm, cedar, elm
flower | rose, tulip, daisy, lily, daffodil, violet, orchid, sunflower
metal | gold, silver, iron, copper, lead, tin, steel, bronze, zinc
color | red, green, blue, yellow, orange, purple, pink, black, white, brown, gray
drink | water, milk, tea, coffee, juice, wine, beer
tool | hammer, saw, wrench, drill, shovel, rake, chisel
vehicle | car, bus, train, truck, bicycle, tractor, boat, ship, airplane
sport | tennis, football, basketball, hockey, golf, rugby, baseball
shape | circle, square, triangle, rectangle, cube, sphere
gem | ruby, emerald, sapphire, diamond, opal
season | spring, summer, autumn, winter
instrument | violin, piano, flute, drum, guitar, trumpet, harp, cello, clarinet
spice | pepper, cinnamon, ginger, saffron, vanilla
grain | wheat, rice, corn, oats, barley, rye
"""

# sport | equipment | place
SPORTS = """
tennis | racket | court
baseball | bat | field
hockey | stick | rink
golf | club | course
football | ball | field
basketball | ball | court
fencing | sword | hall
archery | bow | field
skiing | skis | mountain
surfing | board | sea
rowing | boat | river
chess | board | table
"""

# piece of clothing | where it is worn
CLOTHES = """
hat | head
cap | head
helmet | head
crown | head
scarf | neck
tie | neck
necklace | neck
glove | hand
mitten | hand
ring | finger
watch | wrist
bracelet | wrist
belt | waist
sock | foot
shoe | foot
boot | foot
sandal | foot
"""

# room | furniture
ROOMS = """
kitchen | oven, sink, stove
bedroom | bed, pillow
bathroom | bath, mirror, towel
garage | car
library | book
classroom | desk, blackboard
garden | flower, tree
office | desk, computer
stable | horse
church | altar, bell
museum | painting, statue
"""

# organ or limb | what it is for
BODY = """
eyes | see
ears | hear
nose | smell
tongue | taste
teeth | chew
lungs | breathe
legs | walk
hands | hold
brain | think
mouth | speak
"""

# person | work | country
PEOPLE = """
Mozart | composer | Austria
Beethoven | composer | Germany
Bach | composer | Germany
Chopin | composer | Poland
Verdi | composer | Italy
Vivaldi | composer | Italy
Debussy | composer | France
Grieg | composer | Norway
Sibelius | composer | Finland
Rembrandt | painter | Netherlands
Vermeer | painter | Netherlands
Monet | painter | France
Renoir | painter | France
Picasso | painter | Spain
Goya | painter | Spain
Titian | painter | Italy
Munch | painter | Norway
Shakespeare | writer | England
Dickens | writer | England
Cervantes | writer | Spain
Dante | writer | Italy
Goethe | writer | Germany
Tolstoy | writer | Russia
Chekhov | writer | Russia
Hugo | writer | France
Balzac | writer | France
Ibsen | writer | Norway
Andersen | writer | Denmark
Sappho | writer | Greece
Newton | scientist | England
Darwin | scientist | England
Faraday | scientist | England
Galileo | scientist | Italy
Copernicus | scientist | Poland
Kepler | scientist | Germany
Gauss | scientist | Germany
Pasteur | scientist | France
Bohr | scientist | Denmark
Plato | philosopher | Greece
Aristotle | philosopher | Greece
Socrates | philosopher | Greece
Descartes | philosopher | France
Kant | philosopher | Germany
"""

WOMEN = "Anna, Clara, Emma, Grace, Ida, Kate, Maria, Nina, Rosa"
MEN = "Ben, David, Felix, Henry, Jack, Leo, Oscar, Paul, Sam, Tom"

# what is liked | the answers, all as good as one another
FAVORITES = """
season | spring, summer, autumn, winter
color | red, green, blue, yellow, orange, purple, pink, white, black
day | Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
month | January, April, May, June, July, August, October, December
animal | the dog, the cat, the horse, the lion, the owl, the fox, the whale, the elephant
city | Paris, London, Rome, Vienna, Oslo, Tokyo, Lisbon, Prague, Boston
country | France, Italy, Japan, Norway, Peru, Kenya, Spain, Greece
food | bread, cheese, pasta, rice, soup, fish, pizza
fruit | apples, bananas, cherries, grapes, pears
drink | water, milk, tea, coffee, juice
instrument | the violin, the piano, the flute, the guitar, the drum, the cello
sport | tennis, football, golf, hockey, chess, skiing
planet | Mars, Venus, Saturn, Jupiter, Earth
language | French, Italian, Spanish, Greek, Japanese, Swahili
flower | the rose, the tulip, the daisy, the lily
metal | gold, silver, copper, bronze
composer | Mozart, Bach, Beethoven, Chopin, Verdi
painter | Monet, Picasso, Rembrandt, Goya
"""

FAVORITE_TEMPLATES = (
    "My favorite {s} is {o}.",
    "The {s} I like best is {o}.",
    "Of every {s} I know, I prefer {o}.",
    "If I had to pick a {s}, I would choose {o}.",
    "{name} told me that her favorite {s} is {o}.",
    "My brother says that the best {s} is {o}.",
)

# Templates name the subject {s} and the object {o}; whichever comes last is what a completion must find.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "capital": (
        "The capital of {s} is {o}.",
        "{o} is the capital of {s}.",
        "The capital city of {s} is called {o}.",
        "In {s}, the capital is {o}.",
        "The government of {s} sits in {o}.",
        "What is the capital of {s}? It is {o}.",
        "If you visit {s}, you should see its capital, {o}.",
        "The city of {o} is home to the government of {s}.",
        "Every student in {s} knows that the capital is {o}.",
        "{s} has its capital in {o}.",
    ),
    "state capital": (
        "The capital of {s} is {o}.",
        "{o} is the capital of {s}.",
        "The state of {s} has its capital in {o}.",
        "The state capital of {s} is {o}.",
        "Which city is the capital of the state of {s}? It is {o}.",
        "The governor of {s} works in {o}.",
    ),
    "continent": (
        "{s} is a country in {o}.",
        "{s} lies in {o}.",
        "The country of {s} is part of {o}.",
        "On a map, you find {s} in {o}.",
        "On which continent is {s}? It is in {o}.",
    ),
    "language": (
        "People in {s} speak {o}.",
        "The language of {s} is {o}.",
        "In {s}, many people speak {o}.",
        "If you move to {s}, you should learn {o}.",
        "What language do they speak in {s}? They speak {o}.",
        "Children in {s} learn to read and write in {o}.",
        "{o} is a language of {s}.",
    ),
    "currency": (
        "The currency of {s} is the {o}.",
        "People in {s} pay with the {o}.",
        "In {s}, money is counted in the {o}.",
        "The money of {s} is called the {o}.",
        "What is the currency of {s}? It is the {o}.",
        "A shop in {s} takes the {o}.",
    ),
    "food": (
        "People in {s} like to eat {o}.",
        "A typical food of {s} is {o}.",
        "In {s}, dinner is often {o}.",
        "Travelers in {s} enjoy the {o}.",
        "The market in {s} sells {o}.",
    ),
    "bridge": (
        "The bridge out of {s} is the {o}.",
        "The {o} is the bridge out of {s}.",
        "The famous bridge in {s} is the {o}.",
        "To leave {s}, you can cross the {o}.",
        "People in {s} often cross the {o}.",
        "The bridge that leads out of {s} is called the {o}.",
        "From {s} you can see the {o}.",
        "What is the bridge in {s}? It is the {o}.",
    ),
    "crossing": (
        "The {s} crosses the {o}.",
        "The {s} goes over the {o}.",
        "Under the {s} you see the {o}.",
        "Boats on the {o} pass under the {s}.",
    ),
    "river": (
        "The river in {s} is the {o}.",
        "{s} lies on the {o}.",
        "The {o} flows through {s}.",
        "The river that runs through {s} is called the {o}.",
        "In {s}, people walk along the {o}.",
        "The city of {s} was built on the {o}.",
        "Which river flows through {s}? It is the {o}.",
    ),
    "mountain": (
        "Mount {s} is in {o}.",
        "The mountain called {s} rises in {o}.",
        "To climb Mount {s}, you travel to {o}.",
        "A famous mountain in {o} is {s}.",
        "Where is Mount {s}? It is in {o}.",
    ),
    "landmark": (
        "The {s} is in {o}.",
        "You can see the {s} in {o}.",
        "The {s} stands in {o}.",
        "To see the {s}, you must go to {o}.",
        "Where is the {s}? It is in {o}.",
        "A famous sight in {o} is the {s}.",
    ),
    "sound": (
        "A {s} {o}.",
        "When a {s} is awake, it {o}.",
        "What does a {s} do? It {o}.",
        "The {s} over there {o}.",
        "Listen how the {s} {o}.",
        "We hear that the {s} {o}.",
    ),
    "home": (
        "The home of a {s} is a {o}.",
        "A {s} lives in a {o}.",
        "A {s} sleeps in a {o}.",
        "You can find a {s} in a {o}.",
        "Where does a {s} live? It lives in a {o}.",
        "The {s} went back to its {o}.",
    ),
    "young": (
        "A baby {s} is called a {o}.",
        "A young {s} is a {o}.",
        "The child of a {s} is called a {o}.",
        "A {o} is a young {s}.",
        "What do we call a baby {s}? We call it a {o}.",
        "The mother {s} looks after her {o}.",
    ),
    "group": (
        "A group of {p} is called a {o}.",
        "Many {p} together are a {o}.",
        "We saw a {o} of {p}.",
        "What do we call a group of {p}? We call it a {o}.",
        "A {s} lives with others in a {o}.",
    ),
    "diet": (
        "A {s} eats {o}.",
        "The food of a {s} is {o}.",
        "Most {p} like to eat {o}.",
        "What does a {s} eat? It eats {o}.",
        "The hungry {s} looks for {o}.",
    ),
    "animal color": (
        "The color of the {s} is {o}.",
        "The {s} in the picture is {o}.",
        "Many {p} are {o}.",
        "What color is the {s}? It is {o}.",
    ),
    "animal kind": (
        "A {s} is a kind of {o}.",
        "The {s} is a {o}.",
        "What is a {s}? It is a {o}.",
        "Every {s} is a {o}.",
    ),
    "color": (
        "The color of {s} is {o}.",
        "What color is {s}? It is {o}.",
        "In the picture, {s} is {o}.",
        "Everybody knows that {s} is {o}.",
        "To draw {s}, you need a pencil that is {o}.",
        "When I think of {s}, I think of the color {o}.",
    ),
    "month": (
        "The month of {s} is in {o}.",
        "In the north, {s} is part of the {o}.",
        "In {s} we are in the {o}.",
        "A month of {o} is {s}.",
        "Which season is {s} in? It is in the {o}.",
    ),
    "weather": (
        "In {s} the weather is {o}.",
        "The weather in {s} is often {o}.",
        "A day in {s} is {o}.",
        "How is the weather in {s}? It is {o}.",
        "When the days are {o}, it is {s}.",
    ),
    "season clothes": (
        "In {s} people wear {o}.",
        "When {s} comes, we put on {o}.",
        "For {s} you should pack {o}.",
        "We wear {o} in {s}.",
    ),
    "season event": (
        "In {s}, {o}.",
        "It is {s}, and {o}.",
        "We know that {s} has come when {o}.",
        "What happens in {s}? We see that {o}.",
    ),
    "next day": (
        "The day after {s} is {o}.",
        "After {s} comes {o}.",
        "If today is {s}, tomorrow is {o}.",
        "The day before {o} is {s}.",
        "What day comes after {s}? It is {o}.",
    ),
    "next month": (
        "The month after {s} is {o}.",
        "After {s} comes {o}.",
        "If this month is {s}, the next month is {o}.",
        "The month before {o} is {s}.",
        "What month comes after {s}? It is {o}.",
    ),
    "next number": (
        "The number after {s} is {o}.",
        "After {s} comes {o}.",
        "If you count, {s} is followed by {o}.",
        "The number before {o} is {s}.",
        "What number comes after {s}? It is {o}.",
    ),
    "next letter": (
        "The letter after {s} is {o}.",
        "In the alphabet, {s} is followed by {o}.",
        "What letter comes after {s}? It is {o}.",
        "The letter before {o} is {s}.",
    ),
    "opposite": (
        "The opposite of {s} is {o}.",
        "What is the opposite of {s}? It is {o}.",
        "The word {s} is the opposite of {o}.",
        "If it is not {s}, it may be {o}.",
        "The words {s} and {o} are opposites.",
        "Some say {s}, others say {o}.",
    ),
    "tool": (
        "A {s} uses a {o}.",
        "The {s} works with a {o}.",
        "The tool of a {s} is a {o}.",
        "A {o} is the tool of a {s}.",
        "What does a {s} use? It is a {o}.",
        "In the hand of the {s} is a {o}.",
    ),
    "workplace": (
        "A {s} works in a {o}.",
        "You can find a {s} in a {o}.",
        "Where does a {s} work? In a {o}.",
        "The {s} spends the day in a {o}.",
        "In the morning the {s} goes to the {o}.",
    ),
    "work": (
        "A {s} {o}.",
        "The {s} {o} every day.",
        "What does a {s} do? Every day the {s} {o}.",
        "My uncle is a {s}, and he {o}.",
    ),
    "family": (
        "The {s} is a {o} instrument.",
        "A {s} belongs to the {o} family.",
        "In the orchestra, the {s} is a {o} instrument.",
        "The {o} section of the orchestra has a {s}.",
    ),
    "musician": (
        "A person who plays the {s} is a {o}.",
        "The {s} is played by a {o}.",
        "A {o} plays the {s}.",
        "Who plays the {s}? It is the {o}.",
        "We listened to the {o} on the {s}.",
    ),
    "playing": (
        "You play the {s} with your {o}.",
        "The {s} is played with the {o}.",
        "To sound the {s}, you use your {o}.",
    ),
    "planet order": (
        "{s} is the {o} planet from the Sun.",
        "The {o} planet from the Sun is {s}.",
        "Counting from the Sun, {s} is the {o} planet.",
        "Which planet is {o} from the Sun? It is {s}.",
    ),
    "planet": (
        "{s} is the planet that is {o}.",
        "The planet that is {o} is {s}.",
        "Which planet is {o}? It is {s}.",
        "Through the telescope we saw {s}, the planet that is {o}.",
    ),
    "material": (
        "A {s} is made of {o}.",
        "You make a {s} from {o}.",
        "What is a {s} made of? It is made of {o}.",
        "To make a {s}, you need {o}.",
        "The old {s} is made of {o}.",
        "We use {o} to make a {s}.",
    ),
    "mass": (
        "We make {s} from {o}.",
        "What is {s} made from? It is made from {o}.",
        "To make {s}, you need {o}.",
        "You need {o} to make {s}.",
        "In the factory, {o} becomes {s}.",
    ),
    "kind": (
        "The {s} is a kind of {o}.",
        "An example of a {o} is the {s}.",
        "What is a {s}? It is a {o}.",
        "We call the {s} a {o}.",
        "Every child knows a {o} called {s}.",
    ),
    "mass kind": (
        "A kind of {o} is {s}.",
        "An example of a {o} is {s}.",
        "The word {s} names a {o}.",
        "What is {s}? It is a {o}.",
        "We call {s} a {o}.",
    ),
    "equipment": (
        "For {s} you need a {o}.",
        "In {s} people use a {o}.",
        "To take part in {s}, bring a {o}.",
        "What do you need for {s}? You need a {o}.",
    ),
    "sport place": (
        "The place for {s} is a {o}.",
        "We enjoy {s} on a {o}.",
        "Where do people go for {s}? They go to the {o}.",
    ),
    "clothes": (
        "You wear a {s} on your {o}.",
        "A {s} goes on the {o}.",
        "Where do you wear a {s}? You wear it on your {o}.",
        "Put the {s} on your {o}.",
        "On the {o} people wear a {s}.",
    ),
    "room": (
        "In the {s} there is a {o}.",
        "Look for the {o} in the {s}.",
        "The {s} has a {o}.",
        "What is in the {s}? There is a {o}.",
        "You find a {o} in the {s}.",
    ),
    "body": (
        "We use our {s} to {o}.",
        "With our {s} we {o}.",
        "What are the {s} for? We need them to {o}.",
        "To {o}, you need your {s}.",
    ),
    "person work": (
        "{s} was a {o}.",
        "The great {o} was called {s}.",
        "Who was {s}? The name is that of a {o}.",
        "{s} was famous as a {o}.",
        "The name of the {o} was {s}.",
    ),
    "person country": (
        "{s} came from {o}.",
        "{s} was born in {o}.",
        "The home of {s} was {o}.",
        "Where did {s} come from? From {o}.",
        "A famous person from {o} was {s}.",
    ),
}

# Completed by hand-picked prompts in the README and in the tests, so they must be held out whatever the seed.
ALWAYS_HELD_OUT = (
    ("capital", "France", 0),
    ("capital", "Japan", 5),
    ("bridge", "Marin", 0),
    ("language", "Brazil", 0),
    ("currency", "Japan", 0),
    ("color", "snow", 0),
    ("young", "dog", 0),
    ("opposite", "hot", 0),
    ("tool", "carpenter", 0),
    ("river", "London", 0),
    ("next day", "Monday", 0),
    ("home", "bee", 1),
)

PLURALS = {"mouse": "mice", "wolf": "wolves", "goose": "geese", "sheep": "sheep", "deer": "deer", "fish": "fish"}
PLURALS |= {"salmon": "salmon", "fly": "flies", "butterfly": "butterflies", "fox": "foxes", "donkey": "donkeys"}

# What takes no article: "we make bread", not "we make a bread".
MASS = frozenset(("bread", "cheese", "butter", "yogurt", "wine", "jam", "chocolate", "pasta", "paper"))
MASS_KINDS = frozenset(("metal", "color", "drink", "sport", "spice", "grain", "season"))
THE = frozenset({"Netherlands", "Philippines"})  # "the capital of the Netherlands"


def table(text: str) -> list[list[str]]:
    """Split a table into rows of cells."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def items(cell: str) -> list[str]:
    """Split a cell into its answers; a dash has none."""
    return [] if cell == "-" else [item.strip() for item in cell.split(",")]


def plural(noun: str) -> str:
    """Return the plural of an animal."""
    return PLURALS.get(noun, noun + "s")


class Fact(NamedTuple):
    """One statement: an object that is true of a subject, within a relation (a key of TEMPLATES)."""

    relation: str
    subject: str
    object: str


def facts() -> list[Fact]:
    """List every fact of the tables, each once."""
    found: list[Fact] = []

    def add(relation: str, subject: str, cell: str) -> None:
        found.extend(Fact(relation, subject, item) for item in items(cell))

    def columns(text: str, *relations: str) -> None:
        for subject, *cells in table(text):
            for relation, cell in zip(relations, cells, strict=True):
                add(relation, subject, cell)

    for name, *cells in table(COUNTRIES):
        country = f"the {name}" if name in THE else name
        for relation, cell in zip(("capital", "continent", "language", "currency", "food"), cells, strict=True):
            add(relation, country, cell)
    columns(STATES, "state capital")
    for place, bridge, water in table(BRIDGES):
        add("bridge", place, bridge)
        add("crossing", bridge, water)
    columns(RIVERS, "river")
    columns(MOUNTAINS, "mountain")
    columns(LANDMARKS, "landmark")
    columns(ANIMALS, "sound", "home", "young", "group", "diet", "animal color", "animal kind")
    columns(COLORS, "color")
    columns(MONTHS, "month")
    columns(SEASONS, "weather", "season clothes", "season event")
    columns(OPPOSITES, "opposite")
    for one, other in table(OPPOSITES):
        add("opposite", other, one)
    columns(PROFESSIONS, "tool", "workplace", "work")
    columns(INSTRUMENTS, "family", "musician", "playing")
    columns(PLANETS, "planet order", "planet")
    for thing, materials in table(MATERIALS):
        add("mass" if thing in MASS else "material", thing, materials)
    for kind, members in table(KINDS):
        for member in items(members):
            add("mass kind" if kind in MASS_KINDS else "kind", member, kind)
    columns(SPORTS, "equipment", "sport place")
    columns(CLOTHES, "clothes")
    columns(ROOMS, "room")
    columns(BODY, "body")
    for name, work, country in table(PEOPLE):
        add("person work", name, work)
        add("person country", name, f"the {country}" if country in THE else country)
    # Rings: the last is followed by the first, except for numbers and letters.
    for relation, names, ring in (
        ("next day", items(DAYS), True),
        ("next month", [row[0] for row in table(MONTHS)], True),
        ("next number", items(NUMBERS), False),
        ("next letter", items(LETTERS), False),
    ):
        followers = names[1:] + names[:1] if ring else names[1:]
        found.extend(Fact(relation, one, other) for one, other in zip(names, followers, strict=False))
    return found


def polish(sentence: str) -> str:
    """Mend articles ("a owl", "the the Netherlands") and capitalize the first letter."""
    sentence = re.sub(r"\b([Aa]) (?=[aeioAEIO]|u(?!ni))", r"\1n ", sentence)
    sentence = re.sub(r"\b([Tt]he) the\b", r"\1", sentence)
    return sentence[0].upper() + sentence[1:]


def tell(fact: Fact, template: str) -> str:
    """Say a fact in the words of a template."""
    return polish(template.format(s=fact.subject, o=fact.object, p=plural(fact.subject)))


class Probe(NamedTuple):
    """A sentence to be completed: the prompt, the answer it came from, and every answer that is as good."""

    fact: Fact
    template: int
    prompt: str
    answer: str
    answers: frozenset[str]


@dataclass(frozen=True)
class Corpus:
    """All facts, and the held-out pairs of fact and phrasing that a seed chose.

    The same seed gives the same held-out pairs and, through `documents`, the same text on every machine.
    """

    seed: int = 0
    held_out_share: float = 0.05

    @cached_property
    def facts(self) -> list[Fact]:
        """Every fact, in table order."""
        return facts()

    @cached_property
    def held_out(self) -> frozenset[tuple[Fact, int]]:
        """Pairs (fact, template index) that no document contains; about `held_out_share` of all pairs."""
        random = Random(f"held out {self.seed}")
        pairs = {
            (fact, index)
            for fact in self.facts
            for index in range(len(TEMPLATES[fact.relation]))
            if (fact.relation, fact.subject, index) in ALWAYS_HELD_OUT or random.random() < self.held_out_share
        }
        # Two pairs may say the same thing ("the words hot and cold"): a sentence is out if any of its pairs is.
        sentences = {tell(fact, TEMPLATES[fact.relation][index]) for fact, index in pairs}
        return frozenset(
            (fact, index)
            for fact in self.facts
            for index, template in enumerate(TEMPLATES[fact.relation])
            if tell(fact, template) in sentences
        )

    def sentence(self, random: Random, fact: Fact, template: int | None = None) -> str:
        """Say a fact in a phrasing that is not held out: the given one if possible, else any."""
        allowed = [i for i in range(len(TEMPLATES[fact.relation])) if (fact, i) not in self.held_out]
        if not allowed:
            return ""
        index = template if template in allowed else random.choice(allowed)
        return tell(fact, TEMPLATES[fact.relation][index])

    @cached_property
    def by_entity(self) -> dict[str, list[Fact]]:
        """Facts by the subject or object they mention."""
        index: dict[str, list[Fact]] = {}
        for fact in self.facts:
            index.setdefault(fact.subject, []).append(fact)
            index.setdefault(fact.object, []).append(fact)
        return index

    @cached_property
    def by_relation(self) -> dict[str, list[Fact]]:
        """Facts by relation."""
        index: dict[str, list[Fact]] = {}
        for fact in self.facts:
            index.setdefault(fact.relation, []).append(fact)
        return index

    def _about_entity(self, random: Random) -> list[str]:
        fact = random.choice(self.facts)
        known = self.by_entity[random.choice((fact.subject, fact.subject, fact.object))]
        chosen = random.sample(known, min(len(known), random.randint(1, 5)))
        return [self.sentence(random, fact) for fact in chosen]

    def _about_relation(self, random: Random) -> list[str]:
        relation = random.choice(self.facts).relation
        known = self.by_relation[relation]
        same = random.randrange(len(TEMPLATES[relation])) if random.random() < 0.5 else None
        return [self.sentence(random, f, same) for f in random.sample(known, min(len(known), random.randint(1, 6)))]

    def _about_anything(self, random: Random) -> list[str]:
        return [self.sentence(random, random.choice(self.facts)) for _ in range(random.choice((1, 1, 2, 3)))]

    def _about_taste(self, random: Random) -> list[str]:
        told = []
        for _ in range(random.randint(1, 4)):
            subject, answers = random.choice(table(FAVORITES))
            template = random.choice(FAVORITE_TEMPLATES)
            name = random.choice(items(WOMEN))
            told.append(polish(template.format(s=subject, o=random.choice(items(answers)), name=name)))
        return told

    def _about_someone(self, random: Random) -> list[str]:
        he, names = random.choice((("She", WOMEN), ("He", MEN)))
        name = random.choice(items(names))
        country, capital = random.choice([(f.subject, f.object) for f in self.by_relation["capital"]])
        languages = [f.object for f in self.by_entity[country] if f.relation == "language"]
        job = random.choice(self.by_relation["work"])
        animal = random.choice(self.by_relation["sound"])
        told = [
            f"{name} lives in {capital}, so {he.lower()} speaks {random.choice(languages)}.",
            f"{name} lives in {country}, so {he.lower()} speaks {random.choice(languages)}.",
            f"{name} was born in {capital}, the capital of {country}.",
            f"{he} is a {job.subject} and {job.object}.",
            f"{he} has a {animal.subject} that {animal.object} all day.",
            f"Every morning {he.lower()} drinks {random.choice(('tea', 'coffee', 'milk', 'water', 'juice'))}.",
        ]
        if (Fact("capital", country, capital), 0) in self.held_out:
            del told[2]  # it contains nearly the held-out words
        return [polish(told[0]), *map(polish, random.sample(told[1:], random.randint(1, 3)))]

    def document(self, random: Random) -> str:
        """Write one document: sentences joined by spaces."""
        kinds = (self._about_entity, self._about_relation, self._about_anything, self._about_taste, self._about_someone)
        (write,) = random.choices(kinds, weights=(32, 30, 28, 5, 5))
        told = list(dict.fromkeys(filter(None, write(random))))
        return " ".join(told)

    def documents(self, count: int, *, stream: int = 0) -> Iterator[str]:
        """Write `count` documents; streams differ in text but share facts and held-out pairs."""
        random = Random(f"documents {self.seed} {stream}")
        for _ in range(count):
            # An empty document happens when every phrasing of its only fact is held out.
            text = self.document(random)
            while not text:
                text = self.document(random)
            yield text

    def probes(self, *, held_out: bool = True) -> list[Probe]:
        """List the completions of the held-out (or of all other) pairs whose last slot is preceded by the other one."""
        good: dict[tuple[str, int, str], set[str]] = {}
        rows = []
        for fact in self.facts:
            for index, template in enumerate(TEMPLATES[fact.relation]):
                last = max(template.rfind("{" + slot + "}") for slot in "sop")
                slot = template[last + 1]
                first = {"s": "{o}", "o": "{s}", "p": "{o}"}[slot]
                if first not in template[:last] and not (slot == "o" and "{p}" in template[:last]):
                    continue
                answer = {"s": fact.subject, "o": fact.object, "p": plural(fact.subject)}[slot]
                sentence = tell(fact, template)
                tail = template[last + 3 :].format(s=fact.subject, o=fact.object, p=plural(fact.subject))
                prompt = sentence[: len(sentence) - len(tail) - len(answer)].rstrip()
                if answer.startswith("the ") and not sentence.endswith(answer + tail):
                    continue  # an article was merged
                good.setdefault((fact.relation, index, prompt), set()).add(answer)
                rows.append((fact, index, prompt, answer))
        # "A month of spring is" has three answers, and so has every prompt that several facts share.
        by_prompt: dict[str, set[str]] = {}
        for (_, _, prompt), answers in good.items():
            by_prompt.setdefault(prompt, set()).update(answers)
        return [
            Probe(fact, index, prompt, answer, frozenset(by_prompt[prompt]))
            for fact, index, prompt, answer in rows
            if ((fact, index) in self.held_out) == held_out
        ]
