"""The wording of the embedded stories: beats that stories share, plots with their cases, and banks of near-synonyms.

Templates are separated by " / " or a new line and have named slots. ``{hero} {he} {him} {his}``, ``{friend}``,
``{helper}`` (``{a_helper}`` on first mention), ``{object}``, ``{place}`` ... come from the story's fields; a plot's own
slots (the line that begins with ``*``) come from its case; every other slot names a bank and is drawn afresh each time.
Draws follow a Zipf law over the rank, so common choices stand first. A plot is ``= name : shared beats that follow its
trouble``, its cases (``-``, values in the order of the ``*`` line) and its own beats, which replace shared ones.
"""

from __future__ import annotations

SHARED_BEATS = """
@opening
Once upon a time, there was {a_kind} named {hero}. {He} lived {home}.
There once was {a_kind} named {hero}, and {he} lived {home}. / {hero} was {a_kind} who lived {home}.
In a land not far away, {home}, lived {a_kind}. {His} name was {hero}.
Once there was {a_kind} called {hero}. {He} lived {home} and liked to {hobby}.
@treasure
{He} had {a_object} that {he} loved very much. / {His} favorite toy was {a_object}.
Of all {his} toys, {hero} liked {a_object} best. / For {his} birthday {he} got {a_object}, and {he} took it everywhere.
{hero} loved to {hobby}, but most of all {he} loved to play with {a_object}.
@outing
One {weather} {time}, {hero} went to {place} with {his} {tie}, {friend}.
One {weather} {time}, {hero} met {his} {tie}, {friend}, {in_place}.
On a {weather} {time}, {hero} was {in_place} with {friend}, {his} {tie}.
It was a {weather} {time}. {hero} and {his} {tie}, {friend}, were {in_place}.
@detail
They saw {sight} and heard {sound}. / There were {sight} everywhere. / They could hear {sound}.
The air smelled of {smell}. / "Look at the {sight}!" said {friend}. / They waved at {people} and laughed.
They shared some {food} and talked about {topic}.
@feeling
{hero} felt {sad}. / {hero} was very {sad}, and {his} eyes filled with tears.
{hero} felt {sad} and did not know what to do. / {hero} sat down and felt {sad}.
{hero} let out a long sigh. {He} was {sad}.
{hero}'s heart beat fast, and {he} felt {sad}.
@comfort
"Don't worry," {friend} said {gently}. "We will think of something."
{friend} gave {him} a hug. "I am here with you," {friend_he} said.
"It will be okay," said {friend}. "Let's ask for help."
{friend} sat down close to {him}. "Don't be {sad}," {friend_he} said {gently}.
"What can we do?" {hero} asked. "Let's find someone who knows," said {friend}.
@arrival
Just then, {a_helper} came by. / Soon {a_helper} came to see what was going on. / Then {a_helper} came over to them.
At that moment, {a_helper} saw them and stopped. / After a while, {a_helper} came along the path.
@ending
{hero} and {friend} went home {happy} and ate {food}. / They played {game} until it was time to go home.
That night, {hero} fell asleep with {a_smile} on {his} face.
When {hero} got home, {he} told {his} family all about it. / {hero} gave {friend} a big hug, and they laughed together.
"This was the best day ever," said {hero}, and {friend} {agreed}.
At bedtime, {hero} thought about the day and dreamed of {sight}.
"""

PLOTS = """
= lost : feeling comfort
* clue | spot
- a trail of bent grass | under a thick bush / some small muddy tracks | behind a pile of leaves
- a shiny black feather | next to an empty nest / a line of busy ants | inside a hollow log
- a broken twig | between two gray rocks / a long scratch in the sand | at the bottom of a shallow ditch
- a row of wet footprints | beside a leaky water tank / a bit of torn ribbon | on top of a wooden crate
@setup They put the {object} down and played {game} for a long time.
{hero} left the {object} on the ground and ran off to play {game}.
"Let's play {game}!" said {friend}. So {hero} laid the {object} down, and off they ran.
@trouble When {hero} came back, the {object} was gone! {He} looked {search}, but {he} could not find it.
But then {hero} could not find the {object} anywhere. {He} looked {search}. It was not there.
"Where is my {toy}?" cried {hero}. They searched {search}, but the {object} was nowhere to be seen.
@help "Did you see my {object}?" asked {hero}. "No, but I can see {clue}," said {helper}. "Look there!"
"I lost my {object}," {hero} told {helper}. {Helper} pointed at {clue} and said, "That may show us the way."
@happy They looked {carefully}, and there was the {object}, {spot}! "Thank you!" said {hero}. {He} was so {happy}.
The {object} was {spot}! {hero} hugged the {toy} tight and thanked {helper}. {friend} clapped and cheered.
@lesson From then on, {hero} always took good care of the {object}. / {hero} learned to put {his} things away.
= wish : feeling comfort
* job | doing
- water the thirsty flowers | watering the thirsty flowers / sweep the dusty steps | sweeping the dusty steps
- pick the ripe cherries | picking the ripe cherries / wash the muddy carrots | washing the muddy carrots
- feed the noisy chickens | feeding the noisy chickens / carry the heavy baskets | carrying the heavy baskets
- paint the old fence | painting the old fence / rake the crunchy leaves | raking the crunchy leaves
@treasure More than anything, {he} wished for {a_object}.
{He} had seen {a_object} in the window of a shop, and {he} wanted it very much.
@setup "I wish I had that {object}," {hero} said. "How much money do you have?" asked {friend}.
{hero} told {friend} about the {object} in the shop. "It is so pretty," {he} said with a sigh.
"Every night I dream of that {object}," {hero} told {friend}. "Then let's find a way," {friend_he} said.
@trouble {hero} counted {his} coins. There were only {number}, and the {toy} cost much more.
{hero} looked in {his} pocket, but it was empty. {He} could not buy the {object}.
But the {object} cost too much, and {hero} had just {number} coins in {his} purse.
@help "If you {job} for me, I will pay you," said {helper}. "Yes, please!" said {hero}.
{Helper} listened and said, "I need someone to {job}. I can give you some coins if you work hard."
@happy So {hero} and {friend} spent the whole week {doing}. At last, {hero} could buy the {object}. {He} was {happy}!
They started {doing} right away. It was hard, but soon {hero} had enough coins for the {object}. "Hooray!" {he} cried.
@lesson {hero} learned that good things come to those who work for them.
{He} knew that hard work can make a wish come true.
= fear : comfort
* scare | trick
- a dark tunnel | sing a loud song / a high, shaky bridge | look straight ahead
- a big barking dog behind a gate | stand still and breathe slowly
- a steep, rocky path | take one small step at a time / a narrow plank over a stream | count to twenty
- a cave full of bats | walk softly and hum a tune
- a huge scarecrow with a crooked grin | wave and say good morning
- a creaky old gate with spider webs | think of something funny
@setup They wanted to play with the {object} somewhere new, but on the way there was {scare}.
After a while, they came to {scare}. "Come on," said {friend}, "we have to go past it."
They took the {object} along and walked on. Before long, right in front of them, there was {scare}.
@trouble {hero} stopped and held the {object} tight. {His} knees shook. "I am too scared to go on," {he} whispered.
{hero} began to shake. "I can't do it," {he} said, and {he} hid behind {friend}.
{hero} took one look and stepped back. "Something bad might happen," {he} said in a small voice.
@help "I was afraid once, too," said {helper}. "When you are scared, {trick}. It helps!"
{Helper} smiled at {hero} and said, "Everyone is afraid of something. Just {trick}, and you will be fine."
@happy {hero} decided to {trick}. Step by step, {he} went on, and soon it was over. "I did it!" {he} shouted.
So {hero} took a deep breath and tried to {trick}. It worked! {He} was not afraid anymore, and {he} felt {happy}.
@lesson {hero} learned that being brave means trying even when you are scared. / After that day, {he} was much braver.
= broken : feeling comfort
* cause | fix
- tripped over a root | a drop of strong glue / dropped it on a hard stone | a piece of sticky tape
- pulled it much too hard | a bit of thick string / sat on it by mistake | a thin copper wire
- bumped into a wall | a tiny screw / slipped on a wet step | a strip of wood
- swung it around too fast | a tight green ribbon / let it roll down a slope | a lump of soft clay
@setup {hero} let {friend} hold the {object}, and they took turns playing with it.
{hero} showed the {object} to {friend}. "Wow, it is so nice!" said {friend}.
"Shall we play {game} with the {object}?" asked {hero}. "Oh yes!" said {friend}.
@trouble But then {hero} {cause}. {Crack}! The {object} was broken.
All at once, {hero} {cause}. There was a loud noise, and the {object} broke in two.
It was fun at first. Then {hero} {cause}, and the {object} fell apart. {friend} gasped.
@help {Helper} looked at the {toy} and said, "I think we can fix it. All we need is {fix}."
"Please, can you fix my {object}?" asked {hero}. "Let me see," said {helper}. "I have {fix} right here."
@happy They worked {carefully} with {fix}. Soon the {object} was as good as new, and {hero} jumped for joy.
{Helper} used {fix}, and {hero} and {friend} helped. "It works again!" said {hero}. {He} felt {happy}.
@lesson {hero} learned that broken things can often be fixed.
From that day on, {hero} was more careful with {his} toys.
= share
* plan | reward
- count to fifty and then trade | a bowl of sweet berries / use a sand clock for each turn | a plate of warm pancakes
- sing one song for every turn | two cups of hot cocoa / flip a coin to see who goes first | a basket of juicy plums
- make up a game for two | a jar of golden honey / ring a bell when it is time to switch | a slice of pumpkin bread
- let the youngest start | a bag of crispy popcorn / draw straws to see who goes first | a bunch of purple grapes
@setup {friend} looked at the {object} and asked, "Can I play with it, too?"
"That is a nice {toy}," said {friend}. "May I have a turn?"
@trouble "No, it is mine!" said {hero}, and {he} pulled the {object} away. {friend} began to cry.
{hero} did not want to share the {object}. "Go away," {he} said. {friend} turned around and looked at the ground.
{hero} shook {his} head and held on to the {object}. {friend} pulled at it, and soon they were both shouting.
@help "Why are you two so sad?" asked {helper}. "You can {plan}. Then it is fair for both of you."
{Helper} asked what was wrong. "I have an idea," {helper_he} said. "You could {plan}."
@happy "I am sorry," {hero} said to {friend}. They tried it, and it was fun! {Helper} gave them {reward}.
{hero} said sorry and held out the {object}. They played together, and then they shared {reward} with {helper}.
@lesson {hero} learned that sharing makes playing more fun.
Now {hero} knew that a toy is twice as nice when you share it.
= animal : feeling
* animal | creature | problem | cure
- a tiny bird | bird | had a hurt wing | a soft bandage
- a gray kitten | kitten | was stuck high up in a tree | a long ladder
- a small turtle | turtle | was lying on its back | a gentle push
- a baby duck | duckling | had lost its mother | some bread crumbs
- a thin pony | pony | had a thorn in its hoof | a pair of tweezers
- a little goat | goat | was caught in a fence | a pair of pliers
- a wet bumblebee | bumblebee | could not fly | a spoonful of sugar water
- a lonely lamb | lamb | was shivering with cold | a thick wool scarf
@setup While they were playing with the {object}, they heard a soft cry.
{hero} was showing the {object} to {friend} when they heard a small noise.
"Listen!" said {friend}. {hero} stopped playing with the {object}. Something was crying close by.
@trouble It was {animal}! The poor {creature} {problem}.
There they found {animal}. "Oh dear," said {friend}. The {creature} {problem}.
{friend} looked around and saw {animal}. The {creature} {problem}. "We must do something," said {hero}.
@help "Please help the {creature}," said {hero}. {Helper} nodded. "We need {cure}," {helper_he} said.
{hero} told {helper} about the {creature}. "I know what to do," said {helper}, and soon came back with {cure}.
@happy With {cure}, they helped the {creature}. It looked up at {hero} as if to say thank you, and everyone was {happy}.
They used {cure}, and soon the {creature} was safe. "You are so kind," said {friend}. {hero} smiled {proudly}.
@lesson {hero} learned that even small friends need help sometimes.
{He} knew that being kind to animals is a good thing.
= skill : feeling comfort
* skill | fail | tip
- whistle a tune | only air came out | make your lips round like a ring
- skip rope | the rope got caught around both feet | jump a little sooner
- juggle three balls | the balls fell all over the place | keep your eyes up
- swim | the water splashed everywhere | kick with your legs and stay calm
- climb a tree | the bark was much too slippery | hold the strong branches
- draw a horse | it looked more like a potato | start with simple shapes
- tie a bow | the laces turned into a big knot | make two ears like a bunny
- do a cartwheel | it ended with a bump on the grass | stretch out like a star
@setup "Watch this," said {friend}. "I can {skill}!" {hero} put the {object} aside and watched {carefully}.
{hero} put down the {object}. "Today I want to learn to {skill}," {he} told {friend}.
{friend} could {skill}, but {hero} could not. {hero} laid the {object} down and said, "I want to do that, too."
@trouble {hero} tried, but {fail}. {He} tried again and again, and each time it went wrong.
Then it was time to try, but {fail}. "I will never be able to {skill}," {hero} said.
@help "You must not give up," said {helper}. "Here is a little secret: {tip}."
{Helper} saw how hard {hero} tried. "Let me help," {helper_he} said. "First, {tip}. Then try once more."
@happy {hero} did what {helper} said and practiced {long_time}. At last, {he} could {skill}! "Look at me!" {he} shouted.
{hero} listened and tried one more time. It worked! Now {he} could {skill}, and {friend} clapped {proudly}.
@lesson {hero} learned that if you keep trying, you get better. / {He} was proud because {he} did not give up.
= storm : comfort
* sign | shelter | pastime
- black clouds rolled over the hills | under a stone arch | told funny stories
- the wind began to howl | in an empty shed | made shadow animals on the wall
- thunder rumbled far away | inside a little tent | sang songs about the rain
- the sky turned dark and gray | in a hay loft | counted the drops on a leaf
- lightning flashed above the trees | on a covered porch | guessed riddles
- big drops of rain began to fall | under a wide roof | drank hot tea from a bottle
- hail came down like little stones | in a wagon with a canvas top | played cards
- a cold gust blew leaves into the air | in a dry cellar | ate crackers and cheese
@setup They were playing with the {object} and did not look up at the sky.
{hero} and {friend} were having so much fun with the {object} that they forgot the time.
{hero} let {friend} try the {object}, and neither of them looked up at the clouds.
@trouble Suddenly, {sign}. A storm was coming! The wind took the {object} and blew it away.
Then {sign}. "A storm!" cried {friend}. {hero} tried to hold on to the {object}, but the wind carried it off.
They felt something change, and {sign}. "Oh dear, a storm!" said {hero}. Whoosh! Away went the {object}.
@help "Quick, follow me!" called {helper}. "We will be safe {shelter}."
{Helper} took them to a safe place {shelter}. "We can wait here until it is over," said {helper}.
@happy They {pastime} until the storm was over. Then they found the {object} in a puddle. It was wet, but it was fine.
There they {pastime} and were not afraid. Later, they found the {object} by the path. {hero} felt {happy}!
@lesson {hero} learned to watch the sky. / {hero} knew that a storm is not so bad when you have friends with you.
= secret
* hideout | slip | treat
- inside an old boot | a corner of the paper stuck out | a cake with seven candles
- behind a stack of firewood | the paper made a rustling sound | a tower of cupcakes
- under an upside down bucket | a puppy began to sniff at it | a bowl of fruit punch
- in a hole in a wall | a silly crow cawed at it | a big strawberry tart
- beneath a pile of straw | the bow came loose | a tray of gingerbread
- in a tin box | the lid popped open | a pot of noodle soup
- behind a curtain of ivy | a snail crawled over it | a pitcher of cold lemonade
- under a garden chair | a gust of wind lifted the paper | a cherry pie
@treasure {He} had {a_object}, but it was a secret. It was going to be a present.
{He} had bought {a_object} with {his} own money. It was a gift, and nobody could know.
@setup Tomorrow was the birthday of {friend}, and {hero} had hidden the {object} {hideout}.
"What are you hiding?" asked {friend}. "Nothing," said {hero}. But the {object} for {friend} was {hideout}.
{hero} wanted to give the {object} to {friend} the next day. Until then, {he} kept it {hideout}.
@trouble All of a sudden, {slip}. {friend} turned to look! The secret was almost out.
Then {slip}. "What is that?" asked {friend}. {hero} did not want to spoil the surprise.
But {slip}, and {friend} saw {hero} jump. "Is something there?" {friend_he} asked.
@help {Helper} winked at {hero} and asked, "{friend}, can you help me carry {treat} to the table?"
"{friend}, come and look at this!" called {helper}. "I have made {treat}." So {friend} did not see the {toy}.
@happy
The next day, {hero} gave {friend} the {object}. "Surprise!" {he} cried. {friend} was {happy}, and they shared {treat}.
The secret was safe. In the morning, {friend} opened the paper and saw the {object}. "I love it!" {friend_he} said.
@lesson {hero} learned that giving can be even better than getting. / {He} knew that some secrets are worth keeping.
= race
* course | fall | care
- to the tallest oak and back | slipped on the wet grass | wiped the mud away
- around the fish pond | tripped over a stone | put a bandage on the knee
- over the little hill | ran into a thorny bush | pulled out all the thorns
- along the winding path | stepped into a deep hole | rubbed the sore ankle
- past the three haystacks | slid into a puddle | found a dry coat
- up to the wooden tower | fell over a sleeping dog | brought some cool water
- across the field of clover | lost a shoe in the mud | dug out the shoe
- down to the post office | got a cramp in one leg | helped to stretch the leg
@treasure {He} was a fast runner, and {he} wanted to win {a_object}.
Every day {he} ran as fast as {he} could, because the prize of the big race was {a_object}.
@setup It was the day of the race. They had to run {course}. "Ready, set, go!"
"Let's race {course}!" said {friend}. "The winner gets the {object}." Off they went!
Many runners stood at the line, {hero} and {friend} too. They had to run {course}. "Go!" someone shouted.
@trouble {hero} was ahead, but then {friend} {fall}. "Ouch!" {friend} cried.
They ran side by side. All at once, {friend} {fall} and had to stop.
@help {hero} stopped at once. With {helper}, {he} {care}. "You may lose," said {helper}. "I don't mind," {he} said.
{hero} did not run on. {He} called {helper} over, and they {care}. "You are a true friend," said {helper}.
@happy {hero} and {friend} crossed the line together. Everyone clapped, and {helper} gave them the {object} to share.
They came in last, but {helper} gave the {object} to {hero} for being so kind. They were very {happy}.
@lesson {hero} learned that helping a friend is better than winning.
{hero} knew that a friend is the best prize of all.
= honest : feeling
* thing | amends
- a clay flower pot | plant new tulips in it / a tall glass vase | earn some coins for a new one
- a round kitchen window | pick up all the pieces / a jug of fresh milk | fetch more milk in a pail
- a basket of brown eggs | collect more eggs / a pretty china plate | wash the dishes for a week
- a bird house | build a better one / a tub of blue paint | scrub the whole floor
@setup {hero} tossed the {object} high up into the air. "Be careful!" said {friend}.
{friend} said, "Don't throw the {object} so high!" But {hero} did not listen.
"I bet I can throw the {object} over that tree," said {hero}. {friend} was not so sure.
@trouble {Crack}! The {object} hit {thing}. Now there was a big mess. "We could run away," said {hero}.
The {object} came down and knocked over {thing}. {hero} wanted to hide.
The {object} flew too far and hit {thing}. {hero} and {friend} stared at the mess and went pale.
@help "Who did this?" asked {helper}. {hero} looked at {his} feet. "It was me," {he} said. "I hit {thing}. I am sorry."
{hero} took a deep breath and told {helper} the truth. "I am sorry about that. I hit {thing} with my {toy}."
@happy
"Thank you for telling the truth," said {helper}. {hero} promised to {amends}, and {friend} helped. They felt {happy}.
{Helper} was not angry. "Let's {amends} together," said {helper}. {hero} was glad that {he} had not run away.
@lesson {hero} learned that it is always best to tell the truth. / After that, {hero} always told the truth.
= making : feeling
* dish | mishap | rescue
- an apple pie | the flour spilled all over the place | used some oats
- a birthday card | the ink made a big blot | turned the blot into a whale
- a paper lantern | the paper got a hole in it | covered the hole with stars
- a berry cake | the batter was too thin | stirred in another egg
- a flower crown | the stems kept coming apart | braided the stems
- a puppet show | the stage fell flat | propped it up with bricks
- a pot of soup | it tasted like salt | added a few potatoes
- a model castle | the tower would not stand | made the bottom wider
@setup They wanted to make {dish} as a surprise. {hero} put the {object} on a bench, and they began.
"Let's make {dish}!" said {hero}. {He} put the {object} down next to {friend} and got to work.
{friend} had an idea. "We could make {dish}!" {hero} laid the {object} aside and rolled up {his} sleeves.
@trouble They worked hard, but {mishap}. "It is all wrong!" said {friend}.
At first it went well. But then {mishap}, and {hero} wanted to give up.
@help "Everyone makes mistakes," said {helper}. So they {rescue}. "See?" said {helper}. "Now it is even better."
{Helper} did not laugh at them. "That is easy to fix," {helper_he} said. Together they {rescue}.
@happy Soon they had made {dish}, and it was {great}! {hero} set the {object} beside it, and {helper} clapped.
In the end, it was {great}. "We made {dish} all by ourselves!" said {hero}. {Helper} thanked them with a hug.
@lesson {hero} learned that mistakes can turn into something good.
{hero} knew that working together makes hard things easy.
"""

BANKS = """
sad: sad|worried|upset|unhappy|disappointed|glum|miserable|gloomy|anxious|nervous|troubled|alarmed
happy: happy|glad|proud|joyful|excited|cheerful|thankful|delighted|pleased|relieved|grateful
great: great|beautiful|wonderful|perfect|lovely|fantastic|amazing|splendid|marvelous|terrific
gently: softly|kindly|gently|quietly|calmly|warmly|sweetly|tenderly
carefully: carefully|closely|patiently|eagerly
proudly: proudly|happily|cheerfully|gladly|merrily|warmly
agreed: agreed|nodded|smiled|thought so, too
Crack: Crack|Crash|Snap|Bang|Boom|Clunk|Smash
number: three|two|five|four|six|nine|eleven
long_time: all day|for hours|for a long time|over and over|until lunch
a_smile: a smile|a big smile|a grin|a dreamy smile|a sleepy grin
search: in the bushes|high and low|behind every tree|up and down the path|under the benches|left and right|~
    in the tall grass|around every corner|between the stones|beneath the ferns
game: hide and seek|tag|catch|leapfrog|hopscotch|pirates|follow the leader|marbles|treasure hunt|dress up|~
    tug of war|knights and dragons|musical chairs|explorers|astronauts|shopkeepers
food: cookies|apples|cake|bread and jam|soup|pancakes|ice cream|sandwiches|strawberries|pie|nuts|pizza|carrots|~
    muffins|noodles|bananas|pears|peaches|popcorn|raisins|waffles|honey toast|blueberries|oranges|pudding|~
    cheese|rice|melons|yogurt|biscuits|dumplings|doughnuts|beans|corn|mangoes|pretzels
sight: birds|flowers|butterflies|ducks|tall trees|bees|squirrels|ladybugs|white clouds|frogs|swans|daisies|~
    dragonflies|snails|beetles|crickets|sparrows|mushrooms|acorns|robins|dandelions|caterpillars|geese|pigeons|~
    poppies|pine cones|lizards|violets|feathers|pebbles|moths|tadpoles|sunflowers|woodpeckers|chipmunks|fireflies|~
    vines|lilies|grasshoppers|toadstools|swallows|buttercups|hummingbirds|thistles|cattails|magpies
sound: the leaves rustle|a lark sing|a bell ring|a dog bark|music far away|children laugh|the wind in the trees|~
    a cow moo|bees buzz|a rooster crow|a train go by|the water gurgle|a cuckoo call|a gate squeak|an owl hoot|~
    crickets chirp|a donkey bray|someone hum|church bells chime|a woodcutter chop|a horse neigh|frogs croak|~
    an old clock tick|a truck honk|sheep bleat|a fiddle play|pots clatter|a hammer tap
smell: fresh bread|flowers|cut grass|pine|rain|honey|warm earth|lemons|roses|cinnamon|mint|smoke|wet moss|apples|~
    lavender|vanilla|toast|sweet hay|jasmine|chestnuts|pepper|salt|clover|ginger
people: a woman with a stroller|a man in a boat|two girls on bikes|a family with a picnic|a boy with a balloon|~
    a painter with an easel|a fisherman with a net|a clown in huge shoes|a lady in a straw hat|a cook with a ladle|~
    some sailors|a jogger|three tourists with cameras|a musician with a banjo|an artist in a blue coat|~
    a police officer|some firefighters|a carpenter with a saw|a nurse in white shoes|a driver of a tractor
topic: their dreams|school|animals|pirates|the moon|summer|books|a trip to the sea|dinosaurs|space|magic|monsters|~
    their favorite colors|sports|outer space|castles|trains|whales|the stars|wizards|volcanoes|holidays|robots|~
    mermaids|jungles|penguins|submarines|elephants|planets|deserts|rainbows|giants|kangaroos|islands
hobby: sing|draw|run and jump|read|dance|climb|paint pictures|look at clouds|build towers|collect stones|bake|swim|~
    pick flowers|play music|tell jokes|make up stories|count stars|dig in the dirt|plant seeds|splash in puddles|~
    solve puzzles|catch bugs|fold paper|knit|roll down hills|bang on pots|feed the birds|sew|write letters|invent things
"""
