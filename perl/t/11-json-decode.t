use strict;
use warnings;

use Test::More;

use CPANBridge::JSON;
use CPANBridge::JSON::Decoder;

# Both ways to decode, the second if it is available, must give the same data.
my @decoders = ([ 'pure Perl' => \&CPANBridge::JSON::Decoder::decode ]);
if (!$ENV{CPAN_BRIDGE_JSON} && eval { require Cpanel::JSON::XS; 1 }) {
    push @decoders, [ 'with Cpanel::JSON::XS' => \&CPANBridge::JSON::decode ];
}

for my $decoder (@decoders) {
    my ($name, $decode) = @{$decoder};
    my $error = sub { my ($json) = @_; return eval { $decode->($json); 1 } ? 'none' : $@->message };

    subtest "values, $name" => sub {
        is_deeply($decode->('[]'),             [],                                  'empty array');
        is_deeply($decode->(' { } '),          {},                                  'empty object');
        is_deeply($decode->('"x"'),            'x',                                 'a bare string');
        is_deeply($decode->('{"a":[1,"b",{"c":null}],"d":"e"}'), { a => [ 1, 'b', { c => undef } ], d => 'e' }, 'nested');
        is_deeply($decode->("\n[ 1 ,\t2 , \"x\" ]\r\n"), [ 1, 2, 'x' ],            'white space');
        is_deeply($decode->('{ "a" : 1 , "b" : "c" , "d" : [ ] }'), { a => 1, b => 'c', d => [] }, 'white space in objects');
        my $words = $decode->('{"t":true,"f":false ,"n":null,"o":{"t" : true}}');
        is(join(',', map { defined $words->{$_} ? "$_$words->{$_}" : $_ } qw(t f n)), 't1,f0,n', 'true, false and null in objects');
        ok($words->{o}{t}, '... also inside of others');
        my $flags = $decode->('[true,false]');
        ok($flags->[0] && !$flags->[1], 'booleans are true and false');
        is("$flags->[0]$flags->[1]", '10', '... 1 and 0 as strings');
        is($flags->[0] + $flags->[1], 1, '... and as numbers');
        ok($flags->[0]->isa('JSON::PP::Boolean'), '... and JSON booleans to other modules');
        is(CPANBridge::JSON::encode($flags), '[true,false]', '... and go out as they came');
    };

    subtest "strings, $name" => sub {
        is($decode->('["\"\\\\\/\b\f\n\r\t"]')->[0], "\"\\/\b\f\n\r\t", 'escapes');
        is($decode->('["\u00fc\u20ac\ud83d\ude00\u0000"]')->[0], "\xfc\x{20ac}\x{1f600}\0", '\u escapes');
        is($decode->('["\\\\u0041\\\\"]')->[0], '\\u0041\\', 'an escaped backslash before a u');
        is($decode->(qq(["\xc3\xbc\xe2\x82\xac\xf0\x9f\x98\x80"]))->[0], "\xfc\x{20ac}\x{1f600}", 'UTF-8');
        is($decode->(qq(["\xc3\xbc\\n\\u00fc"]))->[0], "\xfc\n\xfc", 'both');
        is_deeply($decode->(qq({"\xc3\xbc":"\xc3\xa4","a\\nb":1,"\\u20ac":[]})), { "\xfc" => "\xe4", "a\nb" => 1, "\x{20ac}" => [] }, 'keys');
        is($decode->(qq(["\xef\xbf\xbf"]))->[0], "\x{ffff}", 'a non-character');
        is(length $decode->('["' . ('\\n' x 100_000) . '"]')->[0], 100_000, 'many escapes');
        is(CPANBridge::JSON::encode($decode->('["1","007","1.0"]')), '["1","007","1.0"]', 'digits stay strings');
    };

    subtest "numbers, $name" => sub {
        for my $number (qw(0 -1 1.5 999999999 1000000000 9007199254740993 18446744073709551615
            -9223372036854775808 0.30000000000000004 1e+22 5e-324))
        {
            my $value = $decode->("[$number]");
            is($decode->(CPANBridge::JSON::encode($value))->[0], $value->[0], "$number goes there and back");
            ok($value->[0] == $number, "$number is exact");
        }
        for my $text (qw(0.25 -0.25 12.5 -12.5 0.1 -0.0 1.0 123456789.125 1234567890.125 1e3 1.5e-3 0.30000000000000004)) {
            my $value = $decode->($text);
            my $again = $decode->(qq([$text, {"a":$text , "b":[$text]} ]));
            is(CPANBridge::JSON::encode($_), CPANBridge::JSON::encode($value), "$text is the same wherever it stands")
                for $again->[0], $again->[1]{a}, $again->[1]{b}[0];
        }
        is(CPANBridge::JSON::encode($decode->('[-0.0]')), '[-0.0]', 'negative zero');
        for my $digits (qw(18446744073709551616 -9223372036854775809 123456789012345678901234567890)) {
            my $big = $decode->("[$digits,1]");
            is("$big->[0]", $digits, "$digits is exact");
            isa_ok($big->[0], 'Math::BigInt');
            is(CPANBridge::JSON::encode($big), "[$digits,1]", '... and goes back as a number');
            no warnings 'once';
            local $Math::BigInt::accuracy = 3;
            is(CPANBridge::JSON::encode($decode->("[$digits]")), "[$digits]", "... whatever accuracy the script has set for its own");
        }
        srand 1;
        my $wrong = 0;
        for (1 .. 2000) {
            my $float = unpack 'd', pack 'L2', int rand 2**32, int rand 2**32;
            next if $float != $float || abs $float == 9**9**9;
            $wrong++ if $decode->(CPANBridge::JSON::encode([$float]))->[0] != $float;
        }
        is($wrong, 0, 'random floats are exact to the last bit');
    };

    subtest "what is not JSON is refused, $name" => sub {
        for my $bad ('', ' ', '[', ']', '[1', '[1,', '[1,]', '[,1]', '{', '{"a"}', '{"a":}', '{"a":1', '{"a":1,}',
            '{a:1}', '[1] x', '[01]', '[1.]', '[.5]', '[-]', '[+1]', '[1e]', '["a]', '["\x"]', '["\u12"]',
            "[\"\n\"]", "[\"\x01\\n\"]", 'nul', '[tru]', "['a']", '{"a":truex}', '{"a":tru}', '{"a":01}', '{"a":1.}', '{"a":-}', '{"a":.5}', '{"a":true false}', '["\\', '["a\\"]', '[NaN]', '[1 2]', '{"a":1 "b":2}')
        {
            like($error->($bad), qr/\Anot JSON: .* at byte [0-9]+\z/s, "refused: '$bad'");
        }
        like($error->(qq(["\xff"])),             qr/not UTF-8/,  'a byte that is not UTF-8');
        like($error->(qq(["\xc0\x80"])),         qr/not UTF-8/,  'an overlong form');
        like($error->(qq(["\xed\xa0\x80"])),     qr/not UTF-8/,  'a surrogate');
        like($error->(qq(["\xf4\x90\x80\x80"])), qr/not UTF-8/,  'beyond Unicode');
        like($error->('["\ud800"]'),             qr/half/,       'half a pair');
        like($error->('["\ude00\ud83d"]'),       qr/half/,       'a pair the wrong way round');
        like($error->('[1e999]'),                qr/too large/,  'a number too large');
    };

    subtest "depth, $name" => sub {
        my @warnings;
        local $SIG{__WARN__} = sub { push @warnings, @_ };
        my $value = $decode->('[' x 50_000 . ']' x 50_000);
        my $depth = 0;
        while ($value) { $value = $value->[0]; $depth++ }
        is($depth, 50_000, 'deep data is decoded');
        is("@warnings", '', '... without a warning');
    };
}

subtest "the script's own booleans are used" => sub {
    plan skip_all => 'no JSON::PP' if !eval { require JSON::PP; 1 };
    is(ref CPANBridge::JSON::Decoder::decode('true'), 'JSON::PP::Boolean', 'where JSON::PP is loaded');
};

done_testing;
